"""Helpers for torch modules."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn


class DtypePreservingModule(nn.Module):
    """Module whose buffers keep their dtype and bits when the model is cast.

    Scales and factors were chosen and saved in their own dtype, so a cast must not round them
    again. They follow the model to other devices.

    Example:
        >>> FakeQuantize(quantizer).half()  # its scales stay in fp32
    """

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "DtypePreservingModule":
        def move(x: Tensor) -> Tensor:
            result = fn(x)
            return result if result.dtype == x.dtype else x.to(result.device)

        return super()._apply(move, recurse)


def copy_to_meta(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are on the meta device."""
    copies: dict[int, torch.Tensor] = {}  # by the identity of the original, as `deepcopy` expects
    for parameter in model.parameters():
        copies[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    for buffer in model.buffers():
        copies[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(model, copies)
