"""Scales: how values are brought onto a format's grid, how that is chosen, and in which format it is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.formats import NumberFormat

Blocks = Float[Tensor, "blocks block"]  # one row shares a scale
Column = Float[Tensor, "blocks 1"]


@runtime_checkable
class Scaling(Protocol):
    """An invertible map onto the grid and back."""

    def to_grid(self, x: Blocks) -> Blocks: ...
    def from_grid(self, x: Blocks) -> Blocks: ...
    @property
    def scale(self) -> Column: ...


@dataclass(frozen=True)
class Scale:
    """x / scale: zero stays zero."""

    scale: Column

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.scale


@dataclass(frozen=True)
class Affine:
    """x / scale + zero, with a whole-numbered zero point: for ranges that do not lie evenly around zero."""

    scale: Column
    zero: Column

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale + self.zero

    def from_grid(self, x: Blocks) -> Blocks:
        return (x - self.zero) * self.scale


def parts(scaling: Scaling) -> dict[str, Tensor]:
    """The tensors of a scaling by name, as they are stored."""
    return {f.name: getattr(scaling, f.name) for f in fields(scaling)}  # pyright: ignore[reportArgumentType]


def from_parts(found: Mapping[str, Tensor]) -> Scaling:
    """The scaling that has these parts."""
    kind = next(kind for kind in (Scale, Affine) if {f.name for f in fields(kind)} == set(found))
    return kind(**found)


@runtime_checkable
class ScaleRule(Protocol):
    """Chooses a scaling for each block."""

    def __call__(self, blocks: Blocks, fmt: NumberFormat) -> Scaling: ...
    def bits(self, fmt: NumberFormat) -> int:
        """What the scaling of one block costs in storage."""
        ...


def stored(scale: Column, fmt: NumberFormat | None) -> Column:
    """The scale as it will be read back; never 0, so that a block of zeros stays one."""
    if fmt is None:
        return scale.clamp(min=torch.finfo(scale.dtype).tiny)
    return fmt.nearest(scale).clamp(min=fmt.smallest)


@dataclass(frozen=True)
class AbsMax:
    """The smallest symmetric scale that clips nothing. `store` is the format it is kept in, fp32 if None.

    Kept in fp16 it may come out too small by 2^-11 of itself, and clip by as much.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: NumberFormat) -> Scale:
        return Scale(stored(blocks.abs().amax(1, keepdim=True) / fmt.max, self.store))

    def bits(self, fmt: NumberFormat) -> int:
        return self.store.bits if self.store else 32


@dataclass(frozen=True)
class MinMax:
    """The smallest affine range that holds all values and zero, which stays exact.

    The zero point is whole, so one end may be clipped by up to half a step.
    """

    store: NumberFormat | None = None

    def __call__(self, blocks: Blocks, fmt: NumberFormat) -> Affine:
        low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
        scale = stored((high - low) / (fmt.max - fmt.min), self.store)
        return Affine(scale, (fmt.min - low / scale).round().clamp(fmt.min, fmt.max))

    def bits(self, fmt: NumberFormat) -> int:
        return (self.store.bits if self.store else 32) + fmt.bits


@dataclass(frozen=True)
class MinError:
    """Of a rule's answers to ever more clipped blocks, the one with the least error, block by block.

    The error is the sum of |x - Q(x)|^p; `p` = 2.4 is what the AdaRound and BRECQ authors search with.
    Clipping below `lowest` times the range is not tried.
    """

    rule: ScaleRule
    p: float = 2.0
    lowest: float = 0.5
    candidates: int = 50

    def __call__(self, blocks: Blocks, fmt: NumberFormat) -> Scaling:
        best = self.rule(blocks, fmt)
        least = self.error(blocks, best, fmt)
        low, high = blocks.amin(1, keepdim=True), blocks.amax(1, keepdim=True)
        for ratio in torch.linspace(1, self.lowest, self.candidates).tolist()[1:]:
            scaling = self.rule(blocks.clamp(low * ratio, high * ratio), fmt)
            error = self.error(blocks, scaling, fmt)
            better = error < least
            least = torch.where(better, error, least)
            old, new = parts(best), parts(scaling)
            best = type(best)(**{name: torch.where(better, new[name], old[name]) for name in old})
        return best

    def error(self, blocks: Blocks, scaling: Scaling, fmt: NumberFormat) -> Column:
        rounded = scaling.from_grid(fmt.nearest(scaling.to_grid(blocks)))
        return (rounded - blocks).abs().pow(self.p).sum(1, keepdim=True)

    def bits(self, fmt: NumberFormat) -> int:
        return self.rule.bits(fmt)
