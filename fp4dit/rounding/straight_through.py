"""The straight-through estimator: rounded values with the gradient of what was rounded."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """A value with the gradient of another tensor. Neither pass computes anything.

    Example:
        >>> x = torch.tensor(0.7, requires_grad=True)
        >>> StraightThrough.apply(x, x.detach().round())
        tensor(1., grad_fn=<StraightThroughBackward>)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(x: Float[Tensor, "*n"], value: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Return exactly `value`, with the gradient of `x` (straight-through estimator)."""
    return StraightThrough.apply(x, value.detach())  # pyright: ignore[reportReturnType]
