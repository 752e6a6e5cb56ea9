"""What was quantized how, so that an empty model can be made into one that takes the checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fp4dit.attention import QuantProcessor
from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.grid import Grid
from fp4dit.layer import check_source
from fp4dit.packed.layer import PackedLinear, empty
from fp4dit.packed.layout import Layout
from fp4dit.packed.tokens import quantized, token_format
from fp4dit.policy import Place, Rule, places
from fp4dit.quantizer import Quantizer
from fp4dit.ranges import Ranges, whole
from fp4dit.rounding import Rounding, nearest
from fp4dit.transforms import TransformSpec


@dataclass(frozen=True)
class Weights:
    """Layers of one layout. With `ends`, the layers of each range of timesteps follow each other."""

    layers: Sequence[str]
    layout: Layout
    transforms: Sequence[TransformSpec]
    ends: Sequence[int | float]


@dataclass(frozen=True)
class Inputs:
    """Activations, by the names of `policy.places`, that one rule quantizes."""

    places: Sequence[str]
    rule: Rule


@dataclass(frozen=True)
class Description:
    weights: Sequence[Weights]
    inputs: Sequence[Inputs]


def described(
    layers: Mapping[str, PackedLinear], weight: Mapping[str, Rule], activation: Mapping[str, Rule]
) -> Description:
    """Of packed layers, by the rules that quantized them, and the rules that activations follow."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, layer in layers.items():
        alike.setdefault((repr(layer.layout), repr(weight[whole(name)])), []).append(name)
    weights = [
        Weights(tuple(names), layers[names[0]].layout, tuple(rule.transforms), tuple(rule.ranges))
        for names in alike.values()
        for rule in [weight[whole(names[0])]]
    ]
    inputs: dict[str, list[str]] = {}
    for name, rule in activation.items():
        inputs.setdefault(repr(rule), []).append(name)
    return Description(tuple(weights), tuple(Inputs(tuple(names), activation[names[0]]) for names in inputs.values()))


def build_(model: nn.Module, description: Description, dtype: torch.dtype) -> dict[str, PackedLinear]:
    """Put empty packed layers and activation grids into a model whose weights are not there yet, in place.

    Raises:
        UserError: if the model has no such layers.
    """
    clock, made = Clock(), {}
    if any(group.ends for group in description.weights) or any(group.rule.timed for group in description.inputs):
        clock.follow(model)
    for group in description.weights:
        for name in group.layers:
            made[name] = layer_of(model, name, group)
            made[name].dtype = dtype
    for group in description.weights:
        for name in dict.fromkeys(map(whole, group.layers)):
            model.set_submodule(name, joined(name, made, group, clock) if group.ends else made[name])
    fill(model, description.inputs, clock)
    return made


def layer_of(model: nn.Module, name: str, group: Weights) -> PackedLinear:
    source = found(model, whole(name))
    if not isinstance(source, nn.Linear | nn.Conv2d):
        raise UserError(f"{name} is no layer of {type(model).__name__}: the checkpoint is of another model")
    shape = (source.weight.shape[0], source.weight[0].numel())
    try:
        check_source(source)
        return empty(source, group.layout, [spec(*shape) for spec in group.transforms])
    except ValueError as error:
        raise UserError(f"{name} of {type(model).__name__} cannot be what the checkpoint says: {error}") from error


def found(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def joined(name: str, made: Mapping[str, PackedLinear], group: Weights, clock: Clock) -> Ranges:
    names = [f"{name}.ranges.{i}" for i in range(len(group.ends) + 1)]
    lacking = [name for name in names if name not in made]
    if lacking:
        raise UserError(f"the checkpoint describes no {lacking[0]}, and {name} has {len(names)} ranges")
    return Ranges([made[name] for name in names], group.ends, clock)


def fill(model: nn.Module, inputs: Sequence[Inputs], clock: Clock) -> None:
    named = [name.rpartition(".") for group in inputs for name in group.places]
    wanted = {owner for owner, _, operand in named if operand in ("q", "k", "v")}
    for name, module in list(model.named_modules()):
        if name in wanted and hasattr(module, "set_processor"):
            attention: Any = module
            attention.set_processor(QuantProcessor(attention.processor))
    there = places(model)
    for group in inputs:
        rule = group.rule
        shared = Once(rule.quantizer) if rule.quantizer and not rule.observe else None
        for name in group.places:
            place: Place | None = there.get(name)
            if place is None or rule.quantizer is None:
                raise UserError(f"{name} is no activation of {type(model).__name__} that can be quantized")
            place.fill(shared or rule.grid(rule.quantizer, clock), rule.before_norm)


class Once(Grid):
    """An online grid of many layers: what several of them are given, as q, k and v are, and every block is given the
    text, is quantized once, and kept for as long as it is there itself."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__(quantizer)
        self.made, self.tokens = WeakTensorKeyDictionary(), token_format(self)

    def forward(self, x: Float[Tensor, "..."], rounding: Rounding = nearest) -> Float[Tensor, "..."]:
        # A compiler sees for itself what is the same; of an inference tensor nobody knows whether it was written to.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or rounding is not nearest:
            return super().forward(x, rounding)
        if x.is_inference():
            return self.quantized(x)
        found = self.made.get(x)
        if found is None or found[0] != x._version:
            found = self.made[x] = (x._version, self.quantized(x))
        return found[1]

    def quantized(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return quantized(x, self.tokens) if self.tokens else super().forward(x)


def verbatim(model: nn.Module) -> set[str]:
    """The names in the state of a packed model that no dtype may be cast to: all but biases in what is quantized."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, PackedLinear | Grid)
        for name in module.state_dict()
        if name != "bias"
    }
