"""The three products of a linear layer in low-bit training (Quartet, arXiv:2505.14669, algorithm 1)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp4dit.training import kernels, scaled
from fp4dit.training.draws import Draws, Signs
from fp4dit.training.projections import E2M1, Gain, Projected, Projection, Rounded, absmax, quest, turned

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


def gained(product: Float[Tensor, "m o"], gain: Gain, dtype: torch.dtype) -> Float[Tensor, "m o"]:
    return (product if isinstance(gain, float) and gain == 1 else product * gain).to(dtype)


def plain(a: Left, b: Right, gain: Gain, dtype: torch.dtype) -> Float[Tensor, "m o"]:
    """gain * a b^T"""
    return gained(a.to(operand(dtype)) @ b.to(operand(dtype)).T, gain, dtype)


def project(
    way: Projection,
    x: Left,
    signs: Signs | None = None,
    gain: Gain = 1.0,
    generator: torch.Generator | None = None,
) -> Projected:
    """gain * x after signs and a rotation: on a GPU in one pass, where there is a kernel for it."""
    packed = isinstance(way, Rounded) and way.quantizer.format == E2M1 and scaled.offered(x.device)
    known = kernels.settings(way) if x.is_cuda and x.dtype != torch.float64 else None
    if known is None:
        return way(turned(x, signs, gain), generator)
    return kernels.project(x, known, signs, gain, generator, packed)


def product(left: Projected, right: Projected, dtype: torch.dtype) -> Float[Tensor, "m o"]:
    """left right^T, block-scaled where there is hardware for it. That answers in bf16."""
    gain = left.gain * right.gain
    if left.packed and right.packed and scaled.fits(right.packed) and operand(dtype) == torch.bfloat16:
        return gained(scaled.multiply(left.packed, right.packed), gain, dtype)
    return plain(left.values, right.values, gain, dtype)


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
            a, b = (project(recipe.forward, side) for side in (x, weight))
            a, b = (side._replace(values=side.values.to(operand(dtype))) for side in (a, b))
            ctx.save_for_backward(a.values, a.kept, b.values, b.kept)
            ctx.gains, ctx.made_by = (a.gain, b.gain), (recipe.backward, draws)
            ctx.dtypes, ctx.width = (x.dtype, weight.dtype), x.shape[1]
            return product(a, b, dtype)

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
                    sides = project(way, left, signs[i], 1.0, generator), project(way, right, signs[i], gain, generator)
                    turned_slope = product(*sides, slope.dtype)
                answers[i] = back(turned_slope, kept, ctx.width, ctx.dtypes[i])
        return *answers, None, None, None
