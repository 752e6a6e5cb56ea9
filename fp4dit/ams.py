"""A shared mantissa bit: formats of a fractional number of bits per value."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.errors import UserError
from fp4dit.formats import NumberFormat, closest


@dataclass(frozen=True)
class SharedMantissa:
    """`share` neighbouring values along the last axis have one last mantissa bit between them (arXiv:2510.16045).

    A group takes the bit with which it can be rounded to nearest with the lesser squared error, 0 if both are as good.
    So E2M3 in groups of 3 costs 5 1/3 bits a value, and E2M2 in groups of 4 costs 4 1/4. `bits` counts full groups:
    with `tail` "short", what is left at the end of a row forms a smaller one.

    Raises:
        ValueError: if there is no mantissa bit to share, or nobody to share it with.
    """

    base: NumberFormat
    share: int
    tail: Literal["error", "short"] = "error"

    def __post_init__(self) -> None:
        if self.base.mantissa < 1 or self.share < 1:
            raise ValueError(
                f"{self.share} values cannot share a mantissa bit of {self.base.name}: give a format with at least 1 "
                "mantissa bit, and a `share` of at least 1"
            )

    @property
    def name(self) -> str:
        return f"{self.base.name}_share{self.share}"

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
        """
        Raises:
            UserError: always. Which values may be taken depends on those of the group.
        """
        raise UserError(
            f"this rounding chooses for each value by itself, and {self.name} shares a bit between {self.share}: "
            "choose rounding=nearest, or a format without a shared mantissa"
        )

    def nearest(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Round to nearest with the better bit of each group, saturating; within a bit ties go towards zero.

        Raises:
            ValueError: if groups would straddle rows.
        """
        full, left = divmod(x.shape[-1], self.share)
        if left and self.tail == "error":
            raise ValueError(
                f"groups of {self.share} values do not divide a row or block of {x.shape[-1]}: give these layers a "
                "rule of their own with a `share` that divides it, or allow a shorter last group (tail: short)"
            )
        if left:
            head, rest = x.split([x.shape[-1] - left, left], dim=-1)
            return torch.cat([self.nearest(head), replace(self, share=left).nearest(rest)], dim=-1)
        groups = x.clamp(self.min, self.max).unflatten(-1, (full, self.share))
        even, odd = (closest(groups, ladder) for ladder in self.ladders())
        costs = [(rounded - groups).square().sum(-1, keepdim=True) for rounded in (even, odd)]
        return torch.where(costs[1] < costs[0], odd, even).flatten(-2)

    def ladders(self) -> tuple[Float[Tensor, "even"], Float[Tensor, "odd"]]:
        """The values whose last mantissa bit is 0, and those where it is 1: every other magnitude."""
        values = self.values()
        odd = (torch.arange(len(values)) - int(values.eq(0).nonzero())) % 2 == 1
        return values[~odd], values[odd]

    def values(self) -> Float[Tensor, "v"]:
        """Every representable value, ascending; one group holds only values of one ladder."""
        return self.base.values()
