"""Rules that say which quantizer each layer and activation gets, by name."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.quantization.attention_products import AttentionProducts
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.quantization.observers import Observer
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import TimestepRangeLinear, base_layer_name
from fp4dit.transforms.base import TransformSpec
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class Rule:
    """The quantizer of all layers, or of all activations, whose name matches a pattern.

    Attributes:
        match: The pattern, with shell wildcards.
        quantizer: The quantizer; None leaves the layers in 16 bits.
        transforms: Transforms of a weight and of the layer's input. For weights only.
        timestep_boundaries: Timesteps that divide the sampling trajectory into ranges. In each, the
            layer has transforms and a weight of its own. For weights only.
        observer: What calibration records of an activation, to choose its static scales from; None
            for dynamic scales. For activations only.
        per_timestep: Whether there are static scales for each timestep. For activations only.
        before_norm: Whether attention's q and k are quantized before the model normalizes and
            rotates them, as in FP4DiT's released code, or only as they enter the attention product.
            For activations only.
        optional: Whether a model may have no layer with such a name.
        attention: How an attention multiplies its operands, if one of them has this rule; None for
            `F.scaled_dot_product_attention`. For activations only.

    Example:
        >>> Rule("*.ff.net.0.proj", Quantizer(floating(3, 0), PerGroup(128)))
    """

    match: str
    quantizer: Quantizer | None
    transforms: Sequence[TransformSpec] = ()
    timestep_boundaries: Sequence[int | float] = ()
    observer: Observer | None = None
    per_timestep: bool = False
    optional: bool = False
    before_norm: bool = False
    attention: AttentionProducts | None = None

    def make_fake_quantize(self, context: TimestepContext) -> FakeQuantize:
        """Return the module that quantizes one activation."""
        assert self.quantizer is not None
        if self.per_timestep:
            return TimestepFakeQuantize(self.quantizer, context)
        return FakeQuantize(self.quantizer, static=self.observer is not None)

    def bits_per_value(self, shape: torch.Size) -> float:
        """Return the bits per value of an activation, with its scales if they are dynamic."""
        assert self.quantizer is not None
        if self.observer:
            return float(self.quantizer.format.bits)
        return self.quantizer.bits_per_value(shape)


@runtime_checkable
class NamedRule(Protocol):
    """A rule of any kind, matched to layers by name.

    Attributes:
        match: The pattern, with shell wildcards.
        optional: Whether a model may have no layer with such a name.

    Example:
        >>> isinstance(Rule("*", None), NamedRule)
        True
    """

    @property
    def match(self) -> str: ...
    @property
    def optional(self) -> bool: ...


RuleT = TypeVar("RuleT", bound=NamedRule)


def assign_rules(names: Iterable[str], rules: Sequence[RuleT]) -> dict[str, RuleT]:
    """Return the first rule that matches each name.

    Raises:
        UserError: if a rule that is not optional matches no name, because the config would then not
            describe what is quantized.
    """
    names = list(names)
    assigned = match_rules(names, rules)
    unused = [repr(rule.match) for rule in unused_rules(assigned, rules) if not rule.optional]
    if unused:
        raise UserError(
            f"no layer is left for the rule {', '.join(unused)}. Rules match names such as "
            f"{', '.join(repr(name) for name in names[:3])} with wildcards, and the first match "
            "wins: correct the pattern or drop the rule."
        )
    return assigned


def unused_rules(assigned: Mapping[str, RuleT], rules: Sequence[RuleT]) -> list[RuleT]:
    """Return the rules that are assigned to no name."""
    return [rule for rule in rules if rule not in assigned.values()]


def match_rules(names: Iterable[str], rules: Sequence[RuleT]) -> dict[str, RuleT]:
    """Return the first rule that matches each name; rules may match nothing.

    Unlike `assign_rules`, it can be used for some of a model's names.
    """
    assigned = {}
    for name in names:
        rule = find_rule(name, rules)
        if rule is not None:
            assigned[name] = rule
    return assigned


def find_rule(name: str, rules: Sequence[RuleT]) -> RuleT | None:
    """Return the first rule that matches a layer's name, or None.

    The layers of timestep ranges have the rule of the layer that they replace.
    """
    for rule in rules:
        if fnmatchcase(base_layer_name(name), rule.match):
            return rule
    return None


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a weight matrix, quantized or not, by name."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A quantized layer contains the original one as `source`.
            layers[name.removesuffix(".source")] = module
    return layers


@contextmanager
def naming_layer_errors(name: str, rule: str) -> Iterator[None]:
    """Turn a ValueError into a UserError that names the layer and its rule."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} (rule {rule!r}): {error}") from error


def make_layer_by_rule(
    name: str, layer: nn.Module, rule: Rule, context: TimestepContext | None
) -> nn.Module:
    """Return the quantized layer, or a module with one quantized layer for each timestep range."""
    assert rule.quantizer is not None
    with naming_layer_errors(name, rule.match):
        quantized = make_quant_layer(layer, rule.quantizer, rule.transforms)
    quantized.share_context(context or TimestepContext())
    if not rule.timestep_boundaries:
        return quantized
    copies = [quantized]
    for _ in rule.timestep_boundaries:
        copies.append(make_quant_layer(copy.deepcopy(layer), rule.quantizer, rule.transforms))
        copies[-1].share_context(context or TimestepContext())
    return TimestepRangeLinear(copies, rule.timestep_boundaries, context or TimestepContext())
