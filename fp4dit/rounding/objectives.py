"""Objectives of learned rounding: the output error of a unit, plus the rounding loss."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class ReconstructionObjective(Protocol):
    """Protocol of objectives, which measure the output error and add the rounding loss to it.

    Example:
        >>> class SumOfSquares:
        ...     def error(self, output, target):
        ...         return sum((y - t).square().sum() for y, t in zip(output, target, strict=True))
        ...
        ...     def __call__(self, error, rtn_error, rounding_loss, count):
        ...         return error + 0.01 * rounding_loss
    """

    def error(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        """Return the distance between the outputs of a unit and those of the original unit."""
        ...

    def __call__(
        self,
        error: Float[Tensor, ""],
        rtn_error: Float[Tensor, ""],
        rounding_loss: Float[Tensor, ""] | float,
        count: int,
    ) -> Float[Tensor, ""]:
        """Return the loss of a step.

        Args:
            error: The error of the soft weights.
            rtn_error: The error of rounding to nearest, on the first batch.
            rounding_loss: The sum over all roundings of how undecided they are.
            count: The number of roundings.
        """
        ...


@dataclass(frozen=True)
class RelativeMSE(ReconstructionObjective):
    """Error as a share of that of round to nearest, plus `weight` times the mean rounding loss.

    Because the error is relative, one `weight` suits all units, whatever the size of their outputs.

    Args:
        weight: The weight of the mean rounding loss.

    Example:
        >>> objective = RelativeMSE(weight=10.0)
        >>> loss = objective(error, rtn_error, rounding_loss, count=1024)
    """

    weight: float = 1000.0

    def error(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Float[Tensor, ""]:
        pairs = zip(output, target, strict=True)
        return torch.stack([(y - t).float().square().mean() for y, t in pairs]).sum()

    def __call__(
        self,
        error: Float[Tensor, ""],
        rtn_error: Float[Tensor, ""],
        rounding_loss: Float[Tensor, ""] | float,
        count: int,
    ) -> Float[Tensor, ""]:
        smallest = torch.finfo(rtn_error.dtype).tiny
        return error / rtn_error.clamp(min=smallest) + self.weight * rounding_loss / count
