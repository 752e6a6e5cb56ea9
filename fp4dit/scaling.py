"""Scalings: maps of values onto a format's grid and back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Blocks = Float[Tensor, "blocks block"]  # one row shares a scale
Column = Float[Tensor, "blocks 1"]
Spread = Float[Tensor, "#blocks #block"]  # a number for each block, for each place in a block, or for each value


@runtime_checkable
class Scaling(Protocol):
    """An invertible map onto the grid and back."""

    def to_grid(self, x: Blocks) -> Blocks: ...
    def from_grid(self, x: Blocks) -> Blocks: ...
    def unit(self, grid: Blocks) -> Spread:
        """How long one unit of the grid is at these grid points, in units of the tensor."""
        ...


@dataclass(frozen=True)
class Scale:
    """x / scale: zero stays zero. One scale for each block, or, in a row, for each place in a block."""

    scale: Spread

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.scale

    def unit(self, grid: Blocks) -> Spread:
        return self.scale


@dataclass(frozen=True)
class Affine:
    """x / scale + zero, with a whole-numbered zero point: for ranges that do not lie evenly around zero."""

    scale: Column
    zero: Column

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale + self.zero

    def from_grid(self, x: Blocks) -> Blocks:
        return (x - self.zero) * self.scale

    def unit(self, grid: Blocks) -> Spread:
        return self.scale


@dataclass(frozen=True)
class Offset:
    """(x - offset) / scale, with a real offset: where the fine steps of an unsigned float go (arXiv:2505.21591)."""

    scale: Column
    offset: Column

    def to_grid(self, x: Blocks) -> Blocks:
        return (x - self.offset) / self.scale

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.scale + self.offset

    def unit(self, grid: Blocks) -> Spread:
        return self.scale


@dataclass(frozen=True)
class TwoSided:
    """x / positive from zero upwards, x / negative below: zero stays zero (arXiv:2311.01792)."""

    positive: Column
    negative: Column

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.unit(x)

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.unit(x)

    def unit(self, grid: Blocks) -> Spread:
        return torch.where(grid >= 0, self.positive, self.negative)


def parts(scaling: Scaling) -> dict[str, Tensor]:
    """The tensors of a scaling by name, as they are stored."""
    return {f.name: getattr(scaling, f.name) for f in fields(scaling)}  # pyright: ignore[reportArgumentType]


KINDS = {tuple(f.name for f in fields(kind)): kind for kind in (Scale, Affine, Offset, TwoSided)}


def from_parts(found: Mapping[str, Tensor]) -> Scaling:
    """The scaling that has these parts."""
    return next(kind for names, kind in KINDS.items() if set(names) == set(found))(**found)
