"""How far AdaRound has gone between two neighbours, `h`, and what is made of it at each step.

The derivatives are written out. Autograd's are the same to the last digit, but keep eight tensors of the weight's size
until they are needed; here nothing is kept, and on a CPU the steps in between stay in the cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

LOW, HIGH = -0.1, 1.1  # stretch the sigmoid so that h reaches 0 and 1 exactly
PIECE = 2**17  # values worked on at once on a CPU: whole vectors, as their digits could be others at the end of one

Flat = Float[Tensor, "n"]
Temperature = Flat | Float[Tensor, ""]


def sigmoid(v: Flat, temperature: Temperature) -> Flat:
    return (v / temperature).sigmoid_()


def stretched(sigmoid: Flat) -> Flat:
    return (sigmoid * (HIGH - LOW)).add_(LOW)


def back(slope: Flat, inside: Flat, sigmoid: Flat) -> Flat:
    """The slope by v / temperature, given that by h."""
    return torch.ops.aten.sigmoid_backward(slope.mul_(inside).mul_(HIGH - LOW), sigmoid)


def pieces(first: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Parts of tensors of one size; a scalar is part of each."""
    size = PIECE if first.device.type == "cpu" else first.numel()
    flat = [x.reshape(-1) if x.ndim else x for x in (first, *others)]
    for start in range(0, first.numel(), size):
        yield [x[start : start + size] if x.ndim else x for x in flat]


class Soft(torch.autograd.Function):
    """The soft weights lerp(inner, outer, h) in `dtype`, and the sum of 1 - |2h - 1|^beta: 0 without a `beta`.

    One function for both, so that each direction finds the sigmoid once and reads `v` once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        temperature: Tensor,
        inner: Tensor,
        outer: Tensor,
        beta: float | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(v, temperature, inner, outer)
        ctx.beta = beta
        soft = torch.empty_like(v, dtype=dtype, memory_format=torch.contiguous_format)
        undecided = v.new_zeros(()) if beta is None else torch.empty_like(soft, dtype=v.dtype)
        for x, t, a, b, out, left in pieces(v, temperature, inner, outer, soft, undecided):
            h = stretched(sigmoid(x, t)).clamp_(0, 1)
            out.copy_(torch.lerp(a, b, h))
            if beta is not None:
                torch.sub(1, h.mul_(2).sub_(1).abs_().pow_(beta), out=left)
        return soft, undecided.sum()

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        v, *others = ctx.saved_tensors
        by_soft, by_undecided = slopes
        slope = torch.empty_like(v, memory_format=torch.contiguous_format)
        for x, t, a, b, given, out in pieces(v, *others, by_soft, slope):
            s = sigmoid(x, t)
            stretch = stretched(s)
            h = stretch.clamp(0, 1)
            inside = stretch.eq_(h)  # 1.0 or 0.0
            torch.div(back((b - a).mul_(given), inside, s), t, out=out)
            if ctx.beta is not None:
                side = h.mul_(2).sub_(1)
                by_side = side.abs().pow_(ctx.beta - 1).mul_(ctx.beta).mul_(-by_undecided).mul_(side.sgn_())
                out.add_(back(by_side.mul_(2), inside, s).div_(t))
        return slope, None, None, None, None, None
