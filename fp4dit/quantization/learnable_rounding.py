"""Base class of roundings that are learned."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import Format
from fp4dit.numerics.qparams import Blocks, QParams, as_tensors, from_tensors


class LearnableRounding(nn.Module):
    """Base of learnable roundings of a weight: modules that hold the weight and its rounding.

    Attributes:
        learned_qparams: Qparams to keep in place of the calibrated ones; None if these are not
            learned.

    Example:
        >>> rounding = AdaRound(weight_blocks, floating(2, 1), qparams)
        >>> weight, rounding_loss = rounding.soft_weight(beta=2.0)
        >>> (task_loss(weight) + rounding_loss).backward()
    """

    learned_qparams: QParams | None = None

    def register_initial_qparams(self, qparams: QParams) -> None:
        """Keep the calibrated qparams as buffers that are not saved."""
        for name, value in as_tensors(qparams).items():
            self.register_buffer(f"initial_{name}", value, persistent=False)

    @property
    def initial_qparams(self) -> QParams:
        """The qparams that were registered, on the device of the module."""
        tensors = {}
        for name, value in self.named_buffers():
            if name.startswith("initial_"):
                tensors[name.removeprefix("initial_")] = value
        return from_tensors(tensors)

    def soft_weight(
        self, beta: float | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[Blocks, Float[Tensor, ""] | float]:
        """Return the differentiable weight of a training step, and its rounding loss.

        Args:
            beta: Exponent of the rounding loss. With a large one, the loss has a gradient only for
                roundings that are nearly decided. None: no rounding loss is computed.
            dtype: Dtype of the weight.

        Returns:
            The weight, and the sum over all roundings of how far each is from being decided.
        """
        raise NotImplementedError

    def hard_weight(self) -> Blocks:
        """Return the weight on its grid."""
        raise NotImplementedError

    @property
    def num_roundings(self) -> int:
        """Number of roundings that are learned."""
        return sum(p.numel() for p in self.parameters())


RoundingFactory = Callable[[Blocks, Format, QParams], LearnableRounding]
