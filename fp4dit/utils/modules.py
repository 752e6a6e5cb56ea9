"""Helpers for torch modules."""

from collections.abc import Callable

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
