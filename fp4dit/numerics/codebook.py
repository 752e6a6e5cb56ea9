"""Codebooks: number formats that are given by the list of their values, such as NF4."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Codebook:
    """A format given by its values, which ascend and include 0. They need not be symmetric.

    Rounding to nearest sends a tie to the value nearer to zero.

    Args:
        name: The word for the format in configs.
        bits: The size of one code in bits.
        levels: All values.

    Raises:
        ValueError: if the levels do not ascend, lack 0, or are too many for `bits`.

    Example:
        >>> ternary = Codebook("ternary", 2, (-1.0, 0.0, 1.0))
        >>> ternary.nearest(torch.tensor([-0.7, 0.4]))
        tensor([-1.,  0.])
    """

    name: str
    bits: int
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(low < high for low, high in zip(self.levels, self.levels[1:], strict=False))
        if (
            not ascending
            or 0.0 not in self.levels
            or not 1 <= (len(self.levels) - 1).bit_length() <= self.bits
        ):
            raise ValueError(
                f"the levels of {self.name} are not a codebook of {self.bits} bits: give 2 to "
                f"2^{self.bits} values in ascending order, 0 among them"
            )

    @property
    def max(self) -> float:
        return self.levels[-1]

    @property
    def min(self) -> float:
        return self.levels[0]

    def step(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the distance from each value to the next one further from zero.

        At the ends of the range and beyond, it is the last distance.
        """
        gaps = self.levels_like(x).diff()
        return self.lookup(x, torch.cat([gaps[:1], gaps, gaps[-1:]]))

    def bracket(self, x: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Return the two representable values around `x`, the one nearer to zero first."""
        levels, zero = self.levels_like(x), self.levels.index(0.0)
        inner = torch.cat([levels[: zero + 1], levels[zero:]])
        outer = torch.cat([levels[:1], levels[:zero], levels[zero + 1 :], levels[-1:]])
        return self.lookup(x, inner), self.lookup(x, outer)

    def lookup(self, x: Float[Tensor, "*n"], table: Float[Tensor, "cells"]) -> Float[Tensor, "*n"]:
        """Look up each value's cell in `table`.

        Args:
            table: A number for values below the least level, one for each gap between two levels,
                and one for values above the largest level.
        """
        levels = self.levels_like(x)
        return lookup_interval(x, levels, levels < 0, table)

    def levels_like(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "v"]:
        """Return the levels rounded to the type of `x`, in fp64."""
        return self.values().to(x.dtype).double()

    def nearest(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Round to nearest, ties towards zero, saturating at the ends of the range."""
        return round_to_levels(x, self.values())

    def values(self) -> Float[Tensor, "v"]:
        """Return every representable value, ascending."""
        return torch.tensor(self.levels)


def round_to_levels(x: Float[Tensor, "*n"], levels: Float[Tensor, "v"]) -> Float[Tensor, "*n"]:
    """Round each value to the nearest of some ascending levels.

    A tie goes to the level nearer to zero; 0 between -a and a goes to a.
    """
    levels = levels.to(x.dtype).double()
    middle = (levels[1:] + levels[:-1]) / 2
    return lookup_interval(x, middle, middle > 0, levels)


def lookup_interval(
    x: Float[Tensor, "*n"],
    edges: Float[Tensor, "e"],
    lower: Bool[Tensor, "e"],
    table: Float[Tensor, "cells"],
) -> Float[Tensor, "*n"]:
    """Return the entry of `table` for the interval in which each value lies. NaN stays NaN.

    Args:
        x: The values.
        edges: Ascending bounds of the intervals, in fp64. The type of `x` need not hold them.
        lower: True where a value on the edge belongs to the interval below it.
        table: A number for each interval: below the first edge, between edges, above the last.
    """
    exact = x if x.dtype == torch.float64 else x.float()
    last = edges.to(exact.dtype)  # the last number of the interval below each edge
    beyond = torch.where(lower, last > edges, last >= edges)
    last = torch.where(beyond, last.nextafter(last.new_tensor(-torch.inf)), last)
    last = torch.cat([last, last.new_tensor([torch.inf])])  # nothing but NaN lies above infinity
    cell = torch.bucketize(exact.contiguous(), last.to(x.device), out_int32=True)
    return torch.cat([table, table.new_tensor([torch.nan])]).to(x)[cell]


def compute_nf4_levels() -> tuple[float, ...]:
    """Return the 16 levels of NF4 (arXiv:2305.14314): scaled quantiles of the normal distribution.

    7 levels lie below 0 and 8 above it, evenly spaced in probability on either side.
    """
    # 1 - (1/32 + 1/30) / 2 with the digits of the authors: their levels to the last bit of fp32.
    outermost = 0.9677083
    upper, lower = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n).double()).float()[:-1] for n in (9, 8)
    )
    return tuple((torch.cat([-lower, lower.new_zeros(1), upper.flip(0)]) / upper[0]).tolist())
