"""What a cast of the model leaves alone."""

from collections.abc import Callable

from torch import Tensor, nn


class Verbatim(nn.Module):
    """Keeps its buffers to the bit when the model it is part of is cast: scales and factors that were chosen and saved
    in their own type are not rounded once more. They follow the model to other devices."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Verbatim":
        def moved(x: Tensor) -> Tensor:
            made = fn(x)
            return made if made.dtype == x.dtype else x.to(made.device)

        return super()._apply(moved, recurse)
