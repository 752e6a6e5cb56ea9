"""Which quantizer each layer gets, by name, and an audit of what happened."""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from fp4dit.attention import QuantProcessor
from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.formats import Format
from fp4dit.grid import Grid, TimedGrid, formats
from fp4dit.layer import Entrance, QuantLayer, check_source, wrap
from fp4dit.observers import Observer
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.ranges import Ranges, names, whole
from fp4dit.transforms import TransformSpec


@dataclass(frozen=True)
class Rule:
    """Names like `match` (shell wildcards) get `quantizer`; None leaves them as they are.

    A weight rule may have `transforms`, which the layer's weight and input go through first, and `ranges`, timesteps
    after which the layer is another: transforms, weight and all. An activation rule with
    `observe` is static: its scaling is chosen once, from what that notes of the calibration calls, and once for each
    timestep if it is `timed`. Else it is online. Attention's q and k are quantized as they enter the product or, with
    `before_norm`, before what the model normalizes and rotates them by, as in FP4DiT's released code.

    A rule that is `optional` may match nothing.
    """

    match: str
    quantizer: Quantizer | None
    transforms: Sequence[TransformSpec] = ()
    ranges: Sequence[int | float] = ()
    observe: Observer | None = None
    timed: bool = False
    optional: bool = False
    before_norm: bool = False

    def grid(self, quantizer: Quantizer, clock: Clock) -> Grid:
        return TimedGrid(quantizer, clock) if self.timed else Grid(quantizer, static=self.observe is not None)


def everywhere(
    quantizer: Quantizer,
    by_row: Sequence[str] = (),
    formats: Mapping[str, Format] | None = None,
    leave: Sequence[str] = (),
    match: str = "*",
    by_part: Mapping[str, int] | None = None,
    **others: Any,
) -> list[Rule]:
    """One quantizer for all layers like `match` but some.

    Names like `by_row`, where there are any, get one scale per row instead, no transforms and no ranges; those in
    `by_part` one for each of so many equal parts of a row; names in `formats` another format; those in `leave` stay
    as they are. `others` are what a `Rule` takes.
    """
    plain = {key: value for key, value in others.items() if key not in ("transforms", "ranges")}
    shared = lambda granularity: replace(quantizer, granularity=granularity)
    parts = {name: shared(Granularity("part", parts=count)) for name, count in (by_part or {}).items()}
    return [
        *(Rule(name, None) for name in leave),
        *(Rule(name, shared(Granularity("row")), optional=True, **plain) for name in by_row),
        *(Rule(name, by_parts, optional=True, **others) for name, by_parts in parts.items()),
        *(Rule(name, replace(quantizer, format=fmt), **others) for name, fmt in (formats or {}).items()),
        Rule(match, quantizer, **others),
    ]


@dataclass(frozen=True)
class Entry:
    """One line of an audit. `bits` counts scales; `values` is how many numbers one copy of the tensor holds."""

    name: str
    rule: str
    format: str
    bits: float
    values: int


@runtime_checkable
class Named(Protocol):
    """A rule of any kind."""

    @property
    def match(self) -> str: ...
    @property
    def optional(self) -> bool: ...


Some = TypeVar("Some", bound=Named)


def assign(names: Iterable[str], rules: Sequence[Some]) -> dict[str, Some]:
    """The first rule that matches each name.

    Raises:
        UserError: if a rule gets no name, for then something else is quantized than was asked for.
    """
    chosen = matched(names, rules)
    unmet = [repr(rule.match) for rule in idle(chosen, rules) if not rule.optional]
    if unmet:
        raise UserError(
            f"no layer is left for the rule {', '.join(unmet)}. Rules match names such as "
            f"{', '.join(map(repr, list(names)[:3]))} with wildcards, the first match wins: correct the pattern or "
            "drop the rule."
        )
    return chosen


def idle(chosen: Mapping[str, Some], rules: Sequence[Some]) -> list[Some]:
    """The rules that no name got."""
    return [rule for rule in rules if rule not in chosen.values()]


def matched(names: Iterable[str], rules: Sequence[Some]) -> dict[str, Some]:
    """The same of a part of the names, in which a rule may match nothing."""
    return {name: rule for name in names if (rule := first(name, rules))}


def first(name: str, rules: Sequence[Some]) -> Some | None:
    return next((rule for rule in rules if fnmatchcase(whole(name), rule.match)), None)


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
    shape = torch.Size([len(weight), weight[0].numel()])
    with fitting(name, rule.match):
        check_source(layer)
        kept = sum(spec(*shape).bits() for spec in rule.transforms)
    bits = bits_of(name, rule.match, rule.quantizer, shape) + kept / weight.numel()
    copies = 1 + len(rule.ranges)
    return Entry(name, rule.match, rule.quantizer.format.name, copies * bits, weight.numel())


def bits_of(name: str, rule: str, quantizer: Quantizer, shape: torch.Size) -> float:
    """Bits per value, scales counted; a granularity or format that does not fit is an error that names the layer."""
    with fitting(name, rule):
        block = torch.empty(1, quantizer.granularity.width(shape), device="meta")
        for fmt in formats(quantizer):
            fmt.nearest(block)
        return quantizer.bits(shape)


@contextmanager
def fitting(name: str, rule: str) -> Iterator[None]:
    """What does not fit a layer is an error that names it."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{name} (rule {rule!r}): {error}") from error


def quantize_weights_(
    model: nn.Module, rules: Mapping[str, Rule], check: bool = True, clock: Clock | None = None
) -> dict[str, QuantLayer]:
    """Wrap the layers that `rules` names, in place. Their weights are prepared and rounded by whoever fits them.

    `clock` is that of the model, for rules with ranges of timesteps.
    """
    made: dict[str, QuantLayer] = {}
    for name, rule in rules.items():
        if rule.quantizer is not None:
            layer = model.get_submodule(name)
            if check and not layer.weight.isfinite().all():  # pyright: ignore[reportCallIssue]
                raise UserError(f"the weight of {name} holds NaN or infinity: the checkpoint is damaged")
            with fitting(name, rule.match):
                quantized = wrap(layer, rule.quantizer, rule.transforms)
            if rule.ranges:
                others = [wrap(copy.deepcopy(layer), rule.quantizer, rule.transforms) for _ in rule.ranges]
                quantized = Ranges([quantized, *others], rule.ranges, clock or Clock())
            model.set_submodule(name, quantized)
            made |= names(name, quantized)
    return made


@dataclass(frozen=True)
class Place:
    """Where an activation can be quantized: an attribute of a module. `row` is the number of values of one token.

    `attention` is where a q or k may be normalized before it comes there.
    """

    owner: nn.Module
    attribute: str
    row: int
    attention: nn.Module | None = None

    def fill(self, grid: Grid, before_norm: bool) -> None:
        name = f"norm_{self.attribute}"
        norm = getattr(self.attention, name, None)
        if before_norm and norm is not None:
            setattr(self.attention, name, nn.Sequential(grid, norm))
        else:
            setattr(self.owner, self.attribute, grid)


def places(model: nn.Module) -> dict[str, Place]:
    """What can be quantized while it flows, by name: each layer's input and attention's q, k, v."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Entrance):
            found[name] = Place(module, "activation", module.width)
        processor: Any = getattr(module, "processor", None)
        if isinstance(processor, QuantProcessor):
            head: int = module.inner_dim // module.heads  # pyright: ignore[reportOperatorIssue, reportAssignmentType]
            found |= {f"{name}.{operand}": Place(processor, operand, head, module) for operand in "qkv"}
    return found


def quantize_activations_(model: nn.Module, rules: Sequence[Rule]) -> tuple[dict[str, Grid], dict[str, Rule]]:
    """Put a `Grid` before every quantized layer and attention operand that the rules name, in place.

    Raises:
        UserError: as `assign`, or if a static rule asks for scales that a later call could not use, or a granularity
            does not fit.
    """
    for module in list(model.modules()):
        if hasattr(module, "set_processor") and not isinstance(module.processor, QuantProcessor):
            module.set_processor(QuantProcessor(module.processor))  # pyright: ignore[reportCallIssue]
    found, clock = places(model), Clock()
    clock.follow(model)
    chosen = assign(found, rules)
    made = {name: grid for name, rule in chosen.items() if (grid := put(name, found[name], rule, clock))}
    if rules and not made:
        raise UserError("no activation is quantized: give `activation` a rule with a quantizer, or use activation=none")
    return made, {name: chosen[name] for name in made}


def quantize_inputs_(layers: Mapping[str, QuantLayer], rules: Sequence[Rule]) -> None:
    """Put a `Grid` before those of the layers that the rules name, in place; rules for others are not meant here.

    Raises:
        UserError: as `put`, or if a rule is timed: nobody tells these grids the time.
    """
    for name, layer in layers.items():
        if rule := first(name, rules):
            if rule.timed:
                raise UserError(
                    f"the activation rule {rule.match!r} is timed, and weights are learnt at all timesteps at once: "
                    "choose activations that are not timed, or leave them out while weights are learnt (joint=null)"
                )
            put(name, Place(layer, "activation", layer.width), rule, Clock())


def put(name: str, place: Place, rule: Rule, clock: Clock) -> Grid | None:
    """A grid for one activation, in its place; None if the rule leaves it as it is.

    Raises:
        UserError: if the rule contradicts itself, or its granularity does not fit.
    """
    if rule.quantizer is None:
        return None
    if rule.observe and rule.quantizer.granularity.unit not in ("tensor", "channel"):
        raise UserError(
            f"the activation rule {rule.match!r} is static, so its scales cannot follow tokens: it needs one scale per "
            "tensor (unit: tensor) or per input channel (unit: channel)"
        )
    if rule.timed and not rule.observe:
        raise UserError(f"the activation rule {rule.match!r} is timed, so it must be static: give it an observer")
    if rule.observe and rule.quantizer.granularity.unit == "channel":
        check_channels(rule, rule.observe, place.row)
    bits_of(name, rule.match, rule.quantizer, torch.Size([1, place.row]))
    grid = rule.grid(rule.quantizer, clock)
    place.fill(grid, rule.before_norm)
    return grid


def check_channels(rule: Rule, observer: Observer, row: int) -> None:
    """Raises UserError if what is observed of tokens does not make one scale per channel of any other tokens."""
    grid = Grid(rule.quantizer, static=True)  # pyright: ignore[reportArgumentType]
    try:
        grid.measure(observer.gather([observer.note(torch.zeros(2, row))]))
        grid(torch.zeros(3, row))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the activation rule {rule.match!r} asks for scales per channel (unit: channel), and "
            f"{grid.quantizer.scale} does not make them of what {observer} notes: observe with ChannelRange and scale "
            "with PreShift, or choose unit: tensor"
        ) from error


def check_activations(skeleton: nn.Module, weights: Sequence[Rule], activations: Sequence[Rule]) -> None:
    """Raise what quantizing would raise, on a model without weights."""
    quantize_weights_(skeleton, assign(layers(skeleton), weights), check=False)
    quantize_activations_(skeleton, activations)


def as_made(model: nn.Module, entries: Sequence[Entry]) -> list[Entry]:
    """The audit of a model that is quantized by now: with the formats that were chosen."""
    made = {e.name: model.get_submodule(e.name) for e in entries}
    return [
        replace(e, format=layer.grid.format.name) if isinstance(layer := made[e.name], QuantLayer) else e
        for e in entries
    ]


def effective_bits(entries: Sequence[Entry]) -> float:
    return sum(e.bits * e.values for e in entries) / sum(e.values for e in entries)


def checkpoint_bytes(model: nn.Module, entries: Sequence[Entry]) -> int:
    """Size of the model's weights as packed: each layer at its bits, all other parameters at 16."""
    packed = sum(e.bits * e.values for e in entries)
    other = sum(p.numel() for p in model.parameters()) - sum(e.values for e in entries)
    return math.ceil((packed + 16 * other) / 8)


def as_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    return [asdict(e) for e in entries]
