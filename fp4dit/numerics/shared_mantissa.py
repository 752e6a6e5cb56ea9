"""A mantissa bit shared by neighbors: formats of a fractional number of bits per value."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.codebook import round_to_levels
from fp4dit.numerics.formats import NumberFormat
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class SharedMantissa:
    """A format whose neighbors share their last mantissa bit (AMS-Quant, arXiv:2510.16045).

    A group of neighbors along the last axis takes the bit with the lesser squared error when its
    values are rounded to nearest; 0 if both are as good. So E2M3 in groups of 3 costs 5 1/3 bits a
    value, and E2M2 in groups of 4 costs 4 1/4.

    Attributes:
        base: The format of each value.
        share: How many neighbors share the bit.
        tail: What happens if groups do not divide a row. "short" allows a shorter last group, which
            `bits` does not count; "error" refuses.

    Raises:
        ValueError: if `base` has no mantissa bit, or `share` is less than 1.

    Example:
        >>> SharedMantissa(floating(2, 3), share=3).bits
        5.333333333333333
    """

    base: NumberFormat
    share: int
    tail: Literal["error", "short"] = "short"

    def __post_init__(self) -> None:
        if self.base.mantissa < 1 or self.share < 1:
            raise ValueError(
                f"{self.share} values cannot share a mantissa bit of {self.base.name}: give a "
                "format with at least 1 mantissa bit, and a `share` of at least 1"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name}_share{self.share}{'_strict' if self.tail == 'error' else ''}"

    @property
    def bits(self) -> float:
        return self.base.bits - 1 + 1 / self.share

    @property
    def max(self) -> float:
        return self.base.max

    @property
    def min(self) -> float:
        return self.base.min

    def step(self, x: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return self.base.step(x)

    def bracket(self, x: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
        """Refuse, because the values that one member may take depend on the rest of its group.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"this rounding decides for each value by itself, and {self.name} shares a bit between "
            f"{self.share}: choose rounding=nearest, or a format without a shared mantissa"
        )

    def nearest(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Round to nearest with the better bit of each group, saturating.

        Among values with the same last bit, ties go towards zero.

        Raises:
            ValueError: if groups would straddle rows and `tail` is "error".
        """
        full, left = divmod(x.shape[-1], self.share)
        if left and self.tail == "error":
            raise ValueError(
                f"groups of {self.share} values do not divide a row or block of {x.shape[-1]}: "
                "give these layers a rule of their own with a `share` that divides it, or allow a "
                "shorter last group (tail: short)"
            )
        if left:
            head, rest = x.split([x.shape[-1] - left, left], dim=-1)
            return torch.cat([self.nearest(head), replace(self, share=left).nearest(rest)], dim=-1)
        groups = x.clamp(self.min, self.max).unflatten(-1, (full, self.share))
        even, odd = (round_to_levels(groups, ladder) for ladder in self.values_by_last_bit())
        costs = [(rounded - groups).square().sum(-1, keepdim=True) for rounded in (even, odd)]
        return torch.where(costs[1] < costs[0], odd, even).flatten(-2)

    def values_by_last_bit(self) -> tuple[Float[Tensor, "even"], Float[Tensor, "odd"]]:
        """Return the values whose last mantissa bit is 0, and those whose last bit is 1."""
        values = self.values()
        odd = (torch.arange(len(values)) - int(values.eq(0).nonzero())) % 2 == 1
        return values[~odd], values[odd]

    def values(self) -> Float[Tensor, "v"]:
        """Return every representable value, ascending. One group holds a subset of them."""
        return self.base.values()
