"""The three products of a linear layer in low-bit training (Quartet, arXiv:2505.14669, algorithm 1)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dit.training.draws import Draws, Signs
from fp4dit.training.projections import Gain, Projection, absmax, quest, turned

Left = Float[Tensor, "m k"]
Right = Float[Tensor, "o k"]


@dataclass(frozen=True)
class Recipe:
    """The projection of each product's operands. Without one for `backward`, the gradients' products are plain.

    Raises:
        ValueError: if the forward product is stochastic. Where memory is saved by computing it once more for the
            backward pass, it would be another.
    """

    forward: Projection = field(default_factory=quest)
    backward: Projection | None = field(default_factory=absmax)

    def __post_init__(self) -> None:
        if self.forward.stochastic:
            raise ValueError("the forward product must be the same whenever it is computed: round it to nearest")


def operand(dtype: torch.dtype) -> torch.dtype:
    """What operands are multiplied in. fp16 has too few exponents for the scales of gradients."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def plain(a: Left, b: Right, gain: Gain, dtype: torch.dtype) -> Float[Tensor, "m o"]:
    """gain * a b^T"""
    product = a.to(operand(dtype)) @ b.to(operand(dtype)).T
    return (product if isinstance(gain, float) and gain == 1 else product * gain).to(dtype)


def projected(
    a: Left, b: Right, gain: Gain, way: Projection, signs: Signs, generator: torch.Generator
) -> Float[Tensor, "m o"]:
    """gain * a b^T in the type of a, both projected after random signs and a rotation, which cancel in the product."""
    left = way(turned(a, signs), generator)
    right = way(turned(b, signs, gain), generator)
    return plain(left.values, right.values, left.gain * right.gain, a.dtype)


def back(slope: Left, kept: Bool[Tensor, "m k"] | None, width: int, dtype: torch.dtype) -> Float[Tensor, "m width"]:
    """From the rotated operand to the operand; what was clipped has no slope."""
    slope = slope if kept is None else slope * kept
    return turned(slope)[:, :width].to(dtype)


class LowBitProduct(torch.autograd.Function):
    """x W^T in `dtype`, of rotated and projected operands.

    In the backward products, blocks lie along the output channels for x, and along the tokens for W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe, draws: Draws, dtype: torch.dtype) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            a, b = (recipe.forward(turned(side)) for side in (x, weight))
            a, b = (side._replace(values=side.values.to(operand(dtype))) for side in (a, b))
            ctx.save_for_backward(a.values, a.kept, b.values, b.kept)
            ctx.gains, ctx.made_by = (a.gain, b.gain), (recipe.backward, draws)
            ctx.dtypes, ctx.width = (x.dtype, weight.dtype), x.shape[1]
            return plain(a.values, b.values, a.gain * b.gain, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Any) -> Any:
        [slope], (way, draws) = slopes, ctx.made_by
        x, x_kept, weight, weight_kept = ctx.saved_tensors
        answers: list[Tensor | None] = [None, None]
        with torch.autocast(slope.device.type, enabled=False):
            *signs, generator = draws(slope.device)
            for i, (left, right, kept) in enumerate([(slope, weight.T, x_kept), (slope.T, x.T, weight_kept)]):
                if not ctx.needs_input_grad[i]:
                    continue
                gain = ctx.gains[1 - i]
                if way is None:
                    turned_slope = plain(left, right, gain, slope.dtype)
                else:
                    turned_slope = projected(left, right, gain, way, signs[i], generator)
                answers[i] = back(turned_slope, kept, ctx.width, ctx.dtypes[i])
        return *answers, None, None, None
