"""Base classes of transforms."""

from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.utils.modules import DtypePreservingModule

WeightMatrix = Float[Tensor, "o k"]

InputSample = Float[Tensor, "n t k"]  # n calls of t tokens

FakeQuantizeFn = Callable[[Tensor], Tensor]  # quantizes and dequantizes a tensor


class Transform(DtypePreservingModule):
    """Base of transforms: `transform_input(x) transform_weight(W)^T + compute_bypass(x)` = x W^T.

    In a chain, each transform receives what the previous one returned for x and for W, and the
    bypasses add up. Qparams are computed for the transformed tensors.

    Example:
        >>> class Negate(Transform):
        ...     def transform_input(self, x):
        ...         return -x
        ...
        ...     def transform_weight(self, w):
        ...         return -w
    """

    # A transform that reads the timestep has a `context`, which the layer's model sets.
    needs_timestep: ClassVar[bool] = False

    @property
    def needs_inputs(self) -> bool:
        """Whether the transform is fitted to a sample of inputs."""
        return type(self).fit is not Transform.fit

    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        """Fit the transform to the inputs of a layer. By default there is nothing to fit.

        Args:
            weight: Weight of the layer after the previous transforms of the chain.
            x: Sample of inputs of the layer, after the previous transforms.
            quantizer: Quantizer of the weight.
            fake_quantize_input: Function that fake-quantizes an input; the identity if inputs are
                not quantized.
        """

    @property
    def needs_weight(self) -> bool:
        """Whether the transform is fitted to the weight alone."""
        return type(self).fit_weight is not Transform.fit_weight

    def fit_weight(self, weight: WeightMatrix, quantizer: Quantizer) -> None:
        """Fit the transform to the weight of a layer. By default there is nothing to fit.

        Args:
            weight: Weight of the layer after the previous transforms of the chain.
            quantizer: Quantizer of the weight.
        """

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        """Return the input that is quantized and multiplied."""
        return x

    def transform_weight(self, w: WeightMatrix) -> WeightMatrix:
        """Return the weight that is quantized and multiplied."""
        return w

    def compute_bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"] | None:
        """Return what is added to the layer's output in 16 bits, or None.

        Args:
            x: Input of this transform, not quantized.
        """
        return None

    def storage_bits(self) -> float:
        """Return the size of all saved buffers in bits."""
        return 8.0 * sum(buffer.nbytes for buffer in self.state_dict().values())


@runtime_checkable
class TransformSpec(Protocol):
    """Protocol of functions that make an unfitted transform for a weight of a given shape.

    Example:
        >>> spec = Smoothing(alpha=0.5)
        >>> transform = spec(out=32, k=64)
    """

    def __call__(self, out: int, k: int) -> Transform:
        """Return a transform for a weight of `out` output and `k` input channels.

        Raises:
            ValueError: If the transform is not defined for this shape.
        """
        ...


def apply_in_fp32(f: Callable[[Tensor], Tensor], x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return `f(x)` in the dtype of `x`, computed in at least fp32, also under autocast."""
    with torch.autocast(x.device.type, enabled=False):
        return f(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)


def squared_output_error(
    x: InputSample, weight: WeightMatrix, x_hat: InputSample, weight_hat: WeightMatrix
) -> float:
    """Return ||x W^T - x_hat W_hat^T||^2, the squared error of the layer's output."""
    difference = F.linear(x, weight) - F.linear(x_hat, weight_hat)
    return difference.square().sum(dtype=torch.float64).item()
