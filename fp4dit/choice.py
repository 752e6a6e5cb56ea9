"""Formats chosen by the data: one for a tensor, or one for each block of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.formats import Format, split
from fp4dit.scales import ScaleRule, error
from fp4dit.scaling import Blocks, Column

Costs = Float[Tensor, "formats blocks"]
Index = UInt8[Tensor, "n 1"]


@runtime_checkable
class Criterion(Protocol):
    """What each format would cost each block; the least is best."""

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> Costs: ...


@dataclass(frozen=True)
class LeastError:
    """The sum of |x - Q(x)|^p, with the scaling that the rule gives the format: clipping is chosen along with it."""

    p: float = 2.0

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> Costs:
        return torch.stack([error(blocks, rule(blocks, fmt), fmt, self.p)[:, 0] for fmt in formats])


@dataclass(frozen=True)
class RangeRatio:
    """How many octaves the range of the magnitudes, max / quantile, is from that of the format, max / smallest.

    A reconstruction of how HQ-DiT (arXiv:2405.19751) tells E3M0, E2M1 and E1M2 apart: no code was published, and the
    text says no more than that a ratio of the weights decides. `pooled` measures the ratio once over all blocks
    instead of over each.
    """

    quantile: float = 0.25
    pooled: bool = False

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> Costs:
        magnitudes = blocks.abs().reshape(1, -1) if self.pooled else blocks.abs()
        low = magnitudes.kthvalue(1 + round(self.quantile * (magnitudes.shape[1] - 1)), dim=1).values
        tiny = torch.finfo(low.dtype).tiny  # a block of zeros has a ratio of 1
        ratio = magnitudes.amax(1).clamp(min=tiny).log2() - low.clamp(min=tiny).log2()
        return torch.stack([(ratio - math.log2(octaves(fmt))).abs().expand(len(blocks)) for fmt in formats])


def octaves(fmt: Format) -> float:
    values = fmt.values()
    return fmt.max / values[values > 0].min().item()


@dataclass(frozen=True)
class ScalingLaw:
    """The split of bits that a law of training loss prefers (arXiv:2501.02423), whatever the data.

    The more (E + 0.5)^3.1926 (M + 0.5)^2.9543, the better. It is a law of training in low precision: it need not be
    best for weights that are rounded afterwards.
    """

    def __call__(self, blocks: Blocks, formats: Sequence[Format], rule: ScaleRule) -> Costs:
        costs = [
            -((exponent + 0.5) ** 3.1926) * (mantissa + 0.5) ** 2.9543 for exponent, mantissa in map(split, formats)
        ]
        return blocks.new_tensor(costs).unsqueeze(1).expand(-1, len(blocks))


@dataclass(frozen=True)
class Choice:
    """A format yet to be chosen, out of several that cost the same.

    One for the whole tensor, that with the least summed cost; one for each block; or one for the tensor by the vote
    of its blocks (as in FP8 quantization, arXiv:2208.09225). Between equals the earlier wins.

    Raises:
        ValueError: if a code of one costs more bits than one of another.
    """

    formats: Sequence[Format]
    by: Criterion
    per: Literal["tensor", "block", "majority"] = "tensor"

    def __post_init__(self) -> None:
        if len({fmt.bits for fmt in self.formats}) != 1:
            found = ", ".join(f"{fmt.name} has {fmt.bits:g}" for fmt in self.formats) or "none was given"
            raise ValueError(f"choose between formats of the same number of bits: {found}")

    @property
    def name(self) -> str:
        return joined(self.formats)

    @property
    def bits(self) -> float:
        return float(self.formats[0].bits)

    def cost(self, blocks: int) -> int:
        """Bits that say which format each of so many blocks has; one for a whole tensor is not worth counting."""
        return math.ceil(math.log2(len(self.formats))) * blocks if self.per == "block" else 0

    def choose(self, blocks: Blocks, rule: ScaleRule) -> Index:
        """Which format, by its place in `formats`: one number, or one for each block."""
        costs = self.by(blocks, self.formats, rule)
        best = costs.T.contiguous().argmin(1)  # along rows: eight times faster
        if self.per == "tensor":
            best = costs.sum(1).argmin(0, keepdim=True)
        if self.per == "majority":
            best = best.bincount(minlength=len(self.formats)).argmax(0, keepdim=True)
        return best.to(torch.uint8).unsqueeze(1)

    def pick(self, index: Index) -> Format:
        if index.numel() == 1:
            return self.formats[int(index)]
        return Mixed(self.formats, index)  # pyright: ignore[reportReturnType]  # its max and min are columns


@dataclass(frozen=True, eq=False)
class Mixed:
    """A format for each row of a matrix of blocks, so that `max` and `min` are columns."""

    formats: Sequence[Format]
    index: UInt8[Tensor, "blocks 1"]

    @property
    def name(self) -> str:
        return joined(self.formats)

    @property
    def bits(self) -> float:
        return float(self.formats[0].bits)

    @property
    def max(self) -> Column:
        return self.column([fmt.max for fmt in self.formats])

    @property
    def min(self) -> Column:
        return self.column([fmt.min for fmt in self.formats])

    def column(self, ends: Sequence[float]) -> Column:
        return torch.tensor(ends, device=self.index.device)[self.index.long()]

    def step(self, x: Blocks) -> Blocks:
        return self.by_row(lambda fmt, x: (fmt.step(x),), x)[0]

    def bracket(self, x: Blocks) -> tuple[Blocks, Blocks]:
        inner, outer = self.by_row(lambda fmt, x: fmt.bracket(x), x)
        return inner, outer

    def nearest(self, x: Blocks) -> Blocks:
        return self.by_row(lambda fmt, x: (fmt.nearest(x),), x)[0]

    def by_row(self, apply: Callable[[Format, Blocks], tuple[Blocks, ...]], x: Blocks) -> tuple[Blocks, ...]:
        made = apply(self.formats[0], x)
        for i, fmt in enumerate(self.formats[1:], 1):
            pairs = zip(apply(fmt, x), made, strict=True)
            made = tuple(torch.where(self.index == i, new, old) for new, old in pairs)
        return made

    def values(self) -> Float[Tensor, "v"]:
        """Every value that some row may hold, ascending."""
        return torch.cat([fmt.values() for fmt in self.formats]).unique()


def joined(formats: Sequence[Format]) -> str:
    return "|".join(fmt.name for fmt in formats)
