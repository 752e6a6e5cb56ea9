"""Fits that choose scales by what the layers are given, before they or another fit round the weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.choice import Choice, split
from fp4dit.errors import UserError
from fp4dit.examples import Examples, inputs
from fp4dit.footprint import Pass, Work
from fp4dit.formats import Format
from fp4dit.grid import Grid, formats
from fp4dit.layer import QuantLayer
from fp4dit.observers import ChannelRange
from fp4dit.quantizer import Quantizer
from fp4dit.resume import Trainers
from fp4dit.scales import anchored
from fp4dit.scaling import Scaling, from_parts, parts
from fp4dit.tasks.reconstruct import Curve, Fit, Rounded, check_fit, fit_work

Tokens = Float[Tensor, "n k"]


@dataclass(frozen=True)
class Weighed:
    """Chooses the weights' scales again with each input channel weighed by its mean square, then leaves the rest to
    `then`. The scale rule has to be one that searches."""

    then: Fit = field(default_factory=Rounded)
    batch: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        check_fit(self.then, layers)
        if not any(heeds_importance(layer.grid.quantizer, layer.rows.shape[1]) for layer in layers):
            raise UserError(
                "no weight's scale is searched, so that weighing its errors would change nothing: choose weights whose "
                "is, such as weight=fp4_searched, or another rounding"
            )

    def work(self, unit: Pass, rows: int) -> Work:
        then = fit_work(self.then, unit, rows)
        return Work(then.flops + rows * unit.flops, max(then.bytes, self.batch * unit.widest))

    def __call__(self, module: nn.Module, layers: list[QuantLayer], examples: Examples, trainers: Trainers) -> Curve:
        power, count = [torch.zeros(()) for _ in layers], [0] * len(layers)
        for seen in inputs(module, layers, examples, examples.trained, self.batch):
            for i, x in enumerate(seen):
                if x is not None:
                    power[i] = power[i] + x.float().square().sum((0, 1))
                    count[i] += x.shape[0] * x.shape[1]
        for layer, total, n in zip(layers, power, count, strict=True):
            if n:
                weights = (total / n).expand(layer.rows.shape)
                layer.grid.measure(layer.rows, layer.grid.quantizer.granularity.split(weights))
        return self.then(module, layers, examples, trainers)


def heeds_importance(quantizer: Quantizer, k: int) -> bool:
    """Whether its scales for rows of `k` values are others if some values count more: asked with random ones."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randn(16, quantizer.granularity.width(torch.Size([1, k])), generator=generator)
    importance = torch.rand(blocks.shape, generator=generator) ** 8
    scales = lambda fmt: [parts(quantizer.scale(blocks, fmt, given)).values() for given in (None, importance)]
    return any(not torch.equal(a, b) for fmt in formats(quantizer) for a, b in zip(*scales(fmt), strict=True))


@runtime_checkable
class Candidates(Protocol):
    """The ranges to try, given the range of the values and the format."""

    def __call__(self, largest: Float[Tensor, "*n"], fmt: Format) -> Iterator[Float[Tensor, "*n"]]: ...


@dataclass(frozen=True)
class Linear:
    """Evenly spaced shares of the range."""

    lowest: float = 0.1
    highest: float = 1.2
    count: int = 111

    def __call__(self, largest: Float[Tensor, "*n"], fmt: Format) -> Iterator[Float[Tensor, "*n"]]:
        return (largest * ratio for ratio in torch.linspace(self.lowest, self.highest, self.count).tolist())


@dataclass(frozen=True)
class BiasMultiples:
    """Multiples of the real-valued exponent bias that the range amounts to, as the authors of LLM-FP4 search
    (arXiv:2310.16836). What is tried so depends on the absolute size of the values."""

    lowest: float = 0.01
    highest: float = 1.2
    count: int = 100

    def __call__(self, largest: Float[Tensor, "*n"], fmt: Format) -> Iterator[Float[Tensor, "*n"]]:
        # With bias b the largest value is 2^(constant - b).
        width = (self.highest - self.lowest) / self.count
        exponent, mantissa = split(fmt)
        constant = 2.0**exponent + math.log2(2 - 2.0**-mantissa) - 1
        bias = constant - largest.log2()
        return (torch.exp2(constant - (self.lowest + i * width) * bias) for i in range(self.count))


@dataclass(frozen=True)
class OutputSearch:
    """Formats and ranges of a layer's weight and static input, jointly by the error of its output (arXiv:2310.16836).

    In each of at most `rounds`, as long as they gain, all formats and `candidates` for the weight's range (one per
    output channel) are tried with the input as it is quantized by then, and the other way round. What was found
    before is always among them. Each layer is fitted by itself, to `tokens` of its inputs.
    """

    candidates: Candidates = field(default_factory=Linear)
    rounds: int = 3
    tokens: int = 512
    batch: int = 16

    def check(self, layers: Sequence[QuantLayer]) -> None:
        """Raises UserError if a format would be chosen for each block."""
        for fmt in (layer.grid.quantizer.format for layer in layers):
            if isinstance(fmt, Choice) and fmt.per == "block":
                raise UserError(
                    f"the search by a layer's output finds one format for a layer, and {fmt.name} is chosen per block: "
                    "choose per tensor, or another rounding"
                )

    def work(self, unit: Pass, rows: int) -> Work:
        """A pass over the rows, then a product for each range of each format, round for round: of the layer's weight
        with its inputs' moment, and of its sampled inputs with its weight."""
        search = 0
        for layer in unit.layers:
            outputs, inputs = layer.rows.shape
            ranges = sum(len(list(self.candidates(torch.ones(1), fmt))) for fmt in formats(layer.grid.quantizer))
            search += 2 * self.rounds * ranges * outputs * inputs * (inputs + self.tokens)
        return Work(rows * unit.flops + search, self.batch * unit.widest)

    def __call__(self, module: nn.Module, layers: list[QuantLayer], examples: Examples, trainers: Trainers) -> Curve:
        for layer, found in zip(layers, self.sampled(module, layers, examples), strict=True):
            if found is not None:
                self.search(layer, *found)
            layer.freeze()
        return []

    def sampled(
        self, module: nn.Module, layers: list[QuantLayer], examples: Examples
    ) -> list[tuple[Tokens, Float[Tensor, "2 k"]] | None]:
        """Tokens of each layer's unquantized input, evenly spread over the calls to learn from; and the extremes of
        each channel over all of these, for rarely does a sample hold them."""
        grids = [layer.activation for layer in layers]
        for layer in layers:
            layer.activation = nn.Identity()
        n = max(1, self.tokens // math.ceil(len(examples.trained) / self.batch))
        note = ChannelRange(n)
        found: list[list[Tokens]] = [[] for _ in layers]
        for seen in inputs(module, layers, examples, examples.trained, self.batch):
            for kept, x in zip(found, seen, strict=True):
                if x is not None:
                    kept.append(note.note(x))
        for layer, grid in zip(layers, grids, strict=True):
            layer.activation = grid
        gathered = [note.gather(kept) if kept else None for kept in found]
        return [None if rows is None else (rows[2:], rows[:2]) for rows in gathered]

    @torch.no_grad()
    def search(self, layer: QuantLayer, x: Tokens, ends: Float[Tensor, "2 k"]) -> None:
        weight, activation = layer.rows.float(), layer.activation
        x, ends = x.to(weight.device), ends.to(weight.device)
        target, least = x @ weight.T, torch.inf
        for _ in range(self.rounds):
            x_hat = activation(x)
            self.search_weight(layer.grid, weight, x, x_hat)
            weight_hat = layer.grid(weight)
            if isinstance(activation, Grid) and activation.static:
                self.search_input(activation, x, ends, weight_hat, target)
            error = (activation(x) @ weight_hat.T - target).square().sum().item()
            if error >= least:
                return
            least = error

    def search_weight(self, grid: Grid, weight: Float[Tensor, "o k"], x: Tokens, x_hat: Tokens) -> None:
        """The format of least error over all channels, and each channel's best range for it."""
        gram, cross = x_hat.T @ x_hat, x_hat.T @ x
        fixed = ((weight @ (x.T @ x)) * weight).sum(1)

        blocks = grid.quantizer.granularity.split(weight)
        pieces = min(len(blocks), len(weight))  # one range each: a row has one, and so has a whole tensor

        def error(scaling: Scaling, fmt: Format) -> Float[Tensor, "pieces"]:
            hat = fake(scaling, blocks, fmt).view_as(weight)
            rows = ((hat @ gram) * hat).sum(1) - 2 * ((hat @ cross) * weight).sum(1) + fixed
            return rows.view(pieces, -1).sum(1)

        tried = []
        for i, fmt in enumerate(formats(grid.quantizer)):
            start = current(grid, i) or grid.quantizer.scale(blocks, fmt)
            best, least = start, error(start, fmt)
            for scaling in self.scalings(grid.quantizer, blocks, fmt):
                found = error(scaling, fmt)
                better = (found < least).repeat_interleave(len(blocks) // pieces)[:, None]
                least = torch.minimum(found, least)
                pairs = zip(parts(scaling).items(), parts(best).values(), strict=True)
                best = from_parts({name: torch.where(better, new, old) for (name, new), old in pairs})
            tried.append((least.sum().item(), i, best))
        keep(grid, *min(tried, key=lambda one: one[0])[1:])

    def search_input(
        self,
        grid: Grid,
        x: Tokens,
        ends: Float[Tensor, "2 k"],
        weight: Float[Tensor, "o k"],
        target: Float[Tensor, "n o"],
    ) -> None:
        """The format and range of least error for these tokens, ranges being shares of what all tokens span."""
        blocks, whole = (grid.quantizer.granularity.split(values) for values in (x, ends))
        tried = []
        for i, fmt in enumerate(formats(grid.quantizer)):
            start = current(grid, i) or grid.quantizer.scale(whole, fmt)
            for scaling in [start, *self.scalings(grid.quantizer, whole, fmt)]:
                error = (fake(scaling, blocks, fmt).view_as(x) @ weight.T - target).square().sum().item()
                tried.append((error, i, scaling))
        keep(grid, *min(tried, key=lambda one: one[0])[1:])

    def scalings(self, quantizer: Quantizer, blocks: Float[Tensor, "b k"], fmt: Format) -> Iterator[Scaling]:
        """The rule's answers to values shrunk or stretched to each candidate range."""
        shared = quantizer.granularity.unit == "channel"  # then all rows have one range
        largest = blocks.abs().amax().view(1, 1) if shared else blocks.abs().amax(1, keepdim=True)
        rule = anchored(quantizer.scale, blocks)
        for wanted in self.candidates(largest, fmt):
            yield rule(blocks * (wanted / largest.clamp(min=torch.finfo(largest.dtype).tiny)), fmt)


def current(grid: Grid, index: int) -> Scaling | None:
    """What the grid holds, if that is for the format of this index."""
    held = grid.held()
    return grid.scaling if int(held.get("choice", torch.zeros(1)).flatten()[0]) == index else None


def keep(grid: Grid, index: int, scaling: Scaling) -> None:
    if isinstance(grid.quantizer.format, Choice):
        grid.register_buffer("choice", torch.full((1, 1), index, dtype=torch.uint8))
    grid.hold(scaling)


def fake(scaling: Scaling, blocks: Float[Tensor, "b k"], fmt: Format) -> Float[Tensor, "b k"]:
    return scaling.from_grid(fmt.nearest(scaling.to_grid(blocks)))
