"""Quantization parameters: maps of values onto a format's grid and back.

`QParams` are the scales of a tensor's blocks, with zero points or offsets where there are any.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

Blocks = Float[Tensor, "blocks block"]  # the values of one row share a scale

PerBlock = Float[Tensor, "blocks 1"]

# A number for each block, for each place in a block, or for each value.
BroadcastScale = Float[Tensor, "#blocks #block"]


@runtime_checkable
class QParams(Protocol):
    """An invertible map onto the grid and back.

    Example:
        >>> qparams, blocks = Scale(torch.tensor([[0.5]])), torch.tensor([[1.0, -2.0]])
        >>> qparams.from_grid(qparams.to_grid(blocks))
        tensor([[ 1., -2.]])
    """

    def to_grid(self, x: Blocks) -> Blocks: ...
    def from_grid(self, x: Blocks) -> Blocks: ...
    def unit(self, grid: Blocks) -> BroadcastScale:
        """Return how long one unit of the grid is at these grid points, in units of the tensor."""
        ...


QParamsT = TypeVar("QParamsT", bound=QParams)


@dataclass(frozen=True)
class Scale:
    """The symmetric map x / scale. Zero stays zero.

    Attributes:
        scale: A number for each block, or one row with a number for each place in a block.

    Example:
        >>> Scale(torch.tensor([[0.5]])).to_grid(torch.tensor([[1.0, -2.0]]))
        tensor([[ 2., -4.]])
    """

    scale: BroadcastScale

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.scale

    def unit(self, grid: Blocks) -> BroadcastScale:
        return self.scale


@dataclass(frozen=True)
class Affine:
    """The map x / scale + zero, with an integer zero point, for ranges that are off center.

    Attributes:
        scale: The size of a step of the grid, in units of the tensor: for each block, or one row
            with a number for each place in a block.
        zero: The grid point that stands for 0, of the same shape.

    Example:
        >>> half, three = torch.tensor([[0.5]]), torch.tensor([[3.0]])
        >>> Affine(half, three).to_grid(torch.tensor([[1.0, -1.5]]))
        tensor([[5., 0.]])
    """

    scale: BroadcastScale
    zero: BroadcastScale

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.scale + self.zero

    def from_grid(self, x: Blocks) -> Blocks:
        return (x - self.zero) * self.scale

    def unit(self, grid: Blocks) -> BroadcastScale:
        return self.scale


@dataclass(frozen=True)
class Offset:
    """The map (x - offset) / scale, with a real offset (MSFP, arXiv:2505.21591).

    The offset moves the fine steps of an unsigned float to where most values lie.

    Attributes:
        scale: The size of a step of the grid, in units of the tensor.
        offset: The value that the grid point 0 stands for.

    Example:
        >>> half, low = torch.tensor([[0.5]]), torch.tensor([[-1.0]])
        >>> Offset(half, low).to_grid(torch.tensor([[0.0, -1.0]]))
        tensor([[2., 0.]])
    """

    scale: PerBlock
    offset: PerBlock

    def to_grid(self, x: Blocks) -> Blocks:
        return (x - self.offset) / self.scale

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.scale + self.offset

    def unit(self, grid: Blocks) -> BroadcastScale:
        return self.scale


@dataclass(frozen=True)
class TwoSided:
    """The map with one scale for values from zero upwards, and one for those below.

    Zero stays zero (AFPQ, arXiv:2311.01792).

    Attributes:
        positive: The scale of values from zero upwards.
        negative: The scale of values below zero.

    Example:
        >>> half, one = torch.tensor([[0.5]]), torch.tensor([[1.0]])
        >>> TwoSided(half, one).to_grid(torch.tensor([[1.0, -1.0]]))
        tensor([[ 2., -1.]])
    """

    positive: PerBlock
    negative: PerBlock

    def to_grid(self, x: Blocks) -> Blocks:
        return x / self.unit(x)

    def from_grid(self, x: Blocks) -> Blocks:
        return x * self.unit(x)

    def unit(self, grid: Blocks) -> BroadcastScale:
        return torch.where(grid >= 0, self.positive, self.negative)


def as_tensors(qparams: QParams) -> dict[str, Tensor]:
    """Return the tensors of qparams by name, as they are stored."""
    return {f.name: getattr(qparams, f.name) for f in fields(qparams)}  # pyright: ignore[reportArgumentType]


# The names of their tensors are looked up here, because torch.compile cannot trace `fields`.
QPARAMS_TENSORS = tuple(
    (qparams_class, frozenset(f.name for f in fields(qparams_class)))
    for qparams_class in (Scale, Affine, Offset, TwoSided)
)


def from_tensors(tensors: Mapping[str, Tensor]) -> QParams:
    """Return the qparams that consist of these tensors."""
    for qparams_class, names in QPARAMS_TENSORS:
        if names == set(tensors):
            return qparams_class(**tensors)
    raise ValueError(f"no qparams consist of {', '.join(sorted(tensors))}")


def merge_qparams(better: Tensor, new: QParamsT, old: QParamsT) -> QParamsT:
    """Return the new qparams where `better` is true, and the old ones elsewhere."""
    new_tensors, merged = as_tensors(new), {}
    for name, tensor in as_tensors(old).items():
        merged[name] = torch.where(better, new_tensors[name], tensor)
    return type(old)(**merged)
