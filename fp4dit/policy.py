"""Which quantizer each layer gets, by name, and an audit of what happened."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fp4dit.attention import QuantProcessor
from fp4dit.errors import UserError
from fp4dit.layer import Activation, QuantLayer, wrap
from fp4dit.quantizer import Quantizer


@dataclass(frozen=True)
class Rule:
    """Names like `match` (shell wildcards) get `quantizer`; None leaves them as they are.

    An activation rule with `observe` > 0 is static: its scaling is chosen once, from that many values of each
    calibration call. Else it is online.
    """

    match: str
    quantizer: Quantizer | None
    observe: int = 0


@dataclass(frozen=True)
class Entry:
    """One line of an audit. `bits` counts scales; `values` is how many numbers one copy of the tensor holds."""

    name: str
    rule: str
    format: str
    bits: float
    values: int


def assign(names: Iterable[str], rules: Sequence[Rule]) -> dict[str, Rule]:
    """The first rule that matches each name.

    Raises:
        UserError: if a rule gets no name, for then something else is quantized than was asked for.
    """
    chosen = {name: rule for name in names if (rule := next((r for r in rules if fnmatchcase(name, r.match)), None))}
    idle = [rule.match for rule in rules if rule not in chosen.values()]
    if idle:
        raise UserError(
            f"no layer is left for the rule {', '.join(map(repr, idle))}. Rules match names such as "
            f"{', '.join(map(repr, list(names)[:3]))} with wildcards, the first match wins: correct the pattern or "
            "drop the rule."
        )
    return chosen


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a weight matrix, quantized or not, by name."""
    return {
        name.removesuffix(".source"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }


def check_weights(model: nn.Module, rules: Sequence[Rule]) -> list[Entry]:
    """What `quantize_weights_` would do, without touching a weight: also for a model on the meta device.

    Raises:
        UserError: if nothing would be quantized, a rule is idle, or a granularity does not fit a layer.
    """
    found = layers(model)
    chosen = assign(found, rules)
    if not any(rule.quantizer for rule in chosen.values()):
        raise UserError("no layer is quantized: give `weight` a rule that matches, or choose method=fp16 on purpose")
    return [entry(name, layer, chosen.get(name)) for name, layer in found.items()]


def entry(name: str, layer: nn.Module, rule: Rule | None) -> Entry:
    weight: Tensor = layer.weight  # pyright: ignore[reportAssignmentType]
    if rule is None or rule.quantizer is None:
        return Entry(name, rule.match if rule else "-", "fp16", 16.0, weight.numel())
    bits = bits_of(name, rule.match, rule.quantizer, torch.Size([len(weight), weight[0].numel()]))
    return Entry(name, rule.match, rule.quantizer.format.name, bits, weight.numel())


def bits_of(name: str, rule: str, quantizer: Quantizer, shape: torch.Size) -> float:
    """Bits per value, scales counted; a granularity that does not fit is an error that names the layer."""
    try:
        return quantizer.bits(shape)
    except ValueError as error:
        raise UserError(f"{name} (rule {rule!r}): {error}") from error


def quantize_weights_(model: nn.Module, rules: Mapping[str, Rule], check: bool = True) -> dict[str, QuantLayer]:
    """Wrap the layers that `rules` names, in place. Their weights are rounded by whoever fits them."""
    made = {}
    for name, rule in rules.items():
        if rule.quantizer is not None:
            layer = model.get_submodule(name)
            if check and not layer.weight.isfinite().all():  # pyright: ignore[reportCallIssue]
                raise UserError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
            made[name] = wrap(layer, rule.quantizer)  # pyright: ignore[reportArgumentType]
            model.set_submodule(name, made[name])
    return made


@dataclass(frozen=True)
class Place:
    """Where an activation can be quantized: an attribute of a module. `row` is the number of values of one token."""

    owner: nn.Module
    attribute: str
    row: int


def places(model: nn.Module) -> dict[str, Place]:
    """What can be quantized while it flows, by name: each layer's input and attention's q, k, v."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            found[name] = Place(module, "activation", module.rows.shape[1])
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, QuantProcessor):
            head: int = module.inner_dim // module.heads  # pyright: ignore[reportOperatorIssue, reportAssignmentType]
            found |= {f"{name}.{operand}": Place(processor, operand, head) for operand in "qkv"}
    return found


def quantize_activations_(model: nn.Module, rules: Sequence[Rule]) -> tuple[dict[str, Activation], dict[str, Rule]]:
    """Put an `Activation` before every quantized layer and attention operand that the rules name, in place.

    Raises:
        UserError: as `assign`, or if a static rule asks for more than one scale per tensor, or a granularity
            does not fit.
    """
    for module in list(model.modules()):
        if hasattr(module, "set_processor") and not isinstance(module.processor, QuantProcessor):
            module.set_processor(QuantProcessor(module.processor))  # pyright: ignore[reportCallIssue]
    found = places(model)
    chosen = assign(found, rules)
    made = {}
    for name, rule in chosen.items():
        quantizer, place = rule.quantizer, found[name]
        if quantizer is None:
            continue
        if rule.observe and quantizer.granularity.unit != "tensor":
            raise UserError(
                f"the activation rule {rule.match!r} is static, so it needs one scale per tensor (unit: tensor)"
            )
        bits_of(name, rule.match, quantizer, torch.Size([1, place.row]))
        made[name] = Activation(quantizer)
        setattr(place.owner, place.attribute, made[name])
    if rules and not made:
        raise UserError("no activation is quantized: give `activation` a rule with a quantizer, or use activation=none")
    return made, {name: chosen[name] for name in made}


def check_activations(skeleton: nn.Module, weights: Sequence[Rule], activations: Sequence[Rule]) -> None:
    """Raise what quantizing would raise, on a model without weights."""
    quantize_weights_(skeleton, assign(layers(skeleton), weights), check=False)
    quantize_activations_(skeleton, activations)


def effective_bits(entries: Sequence[Entry]) -> float:
    return sum(e.bits * e.values for e in entries) / sum(e.values for e in entries)


def checkpoint_bytes(model: nn.Module, entries: Sequence[Entry]) -> int:
    """Size of the model's weights as packed: each layer at its bits, all other parameters at 16."""
    packed = sum(e.bits * e.values for e in entries)
    other = sum(p.numel() for p in model.parameters()) - sum(e.values for e in entries)
    return math.ceil((packed + 16 * other) / 8)


def as_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [asdict(e) for e in entries]
