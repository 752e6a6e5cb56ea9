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
PIECE = 2**15  # values worked on at once on a CPU: whole vectors, as their digits could be others at the end of one

Flat = Float[Tensor, "n"]
Temperature = Flat | Float[Tensor, ""]


def sigmoid(v: Flat, temperature: Temperature) -> Flat:
    return (v / temperature).sigmoid_()


def stretched(sigmoid: Flat) -> Flat:
    return (sigmoid * (HIGH - LOW)).add_(LOW)


def h(sigmoid: Flat) -> Flat:
    return stretched(sigmoid).clamp_(0, 1)


def back(slope: Flat, sigmoid: Flat, temperature: Temperature) -> Flat:
    """The slope by v, given that by h."""
    x = stretched(sigmoid)
    inside = x.clamp(0, 1).eq_(x)  # 1.0 or 0.0
    return torch.ops.aten.sigmoid_backward(inside.mul_(slope).mul_(HIGH - LOW), sigmoid).div_(temperature)


def pieces(first: Tensor, *others: Tensor) -> Iterator[list[Tensor]]:
    """Parts of tensors of one size; a scalar is part of each."""
    size = PIECE if first.device.type == "cpu" else first.numel()
    flat = [x.reshape(-1) if x.ndim else x for x in (first, *others)]
    for start in range(0, first.numel(), size):
        yield [x[start : start + size] if x.ndim else x for x in flat]


class Soft(torch.autograd.Function):
    """lerp(inner, outer, h)"""

    @staticmethod
    def forward(ctx: Any, v: Tensor, temperature: Tensor, inner: Tensor, outer: Tensor) -> Tensor:
        ctx.save_for_backward(v, temperature, inner, outer)
        soft = torch.empty_like(v, memory_format=torch.contiguous_format)
        for x, t, a, b, out in pieces(v, temperature, inner, outer, soft):
            torch.lerp(a, b, h(sigmoid(x, t)), out=out)
        return soft

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        v, *others = ctx.saved_tensors
        slope = torch.empty_like(v, memory_format=torch.contiguous_format)
        for x, t, a, b, given, out in pieces(v, *others, *slopes, slope):
            out.copy_(back((b - a).mul_(given), sigmoid(x, t), t))
        return slope, None, None, None


class Undecided(torch.autograd.Function):
    """1 - |2h - 1|^beta"""

    @staticmethod
    def forward(ctx: Any, v: Tensor, temperature: Tensor, beta: float) -> Tensor:
        ctx.save_for_backward(v, temperature)
        ctx.beta = beta
        undecided = torch.empty_like(v, memory_format=torch.contiguous_format)
        for x, t, out in pieces(v, temperature, undecided):
            torch.sub(1, h(sigmoid(x, t)).mul_(2).sub_(1).abs_().pow_(beta), out=out)
        return undecided

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        v, temperature = ctx.saved_tensors
        slope = torch.empty_like(v, memory_format=torch.contiguous_format)
        for x, t, given, out in pieces(v, temperature, *slopes, slope):
            s = sigmoid(x, t)
            side = h(s).mul_(2).sub_(1)
            by_h = side.abs().pow_(ctx.beta - 1).mul_(ctx.beta).mul_(-given).mul_(side.sgn_()).mul_(2)
            out.copy_(back(by_h, s, t))
        return slope, None, None
