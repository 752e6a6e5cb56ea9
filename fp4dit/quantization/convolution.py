"""Convolutions computed as linear layers, both quantized and packed ones."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

IntTuple = tuple[int, ...]


@dataclass(frozen=True)
class ConvGeometry:
    """Geometry of a 2-d convolution, with the names and values of `torch.nn.Conv2d`.

    Args:
        kernel_size: Height and width of the kernel.
        dilation: Distance of neighbours in the kernel, in pixels.
        padding: Zeros on each side.
        stride: Distance of neighbouring patches, in pixels.
    """

    kernel_size: IntTuple
    dilation: IntTuple
    padding: IntTuple
    stride: IntTuple


class ConvolutionMixin:
    """Mixin that turns a linear layer into a convolution: each patch of the input is a token.

    The mixin precedes the linear layer among the base classes. Its `forward` unfolds the input, and
    passes the patches to the `forward` of the linear layer.

    Attributes:
        geometry: Geometry of the convolution.

    Example:
        >>> class LinearConv(ConvolutionMixin, nn.Linear):
        ...     geometry = ConvGeometry((2, 2), (1, 1), (0, 0), (2, 2))
        >>> LinearConv(3 * 2 * 2, 8)(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 8, 32, 32])
    """

    geometry: nn.Conv2d | ConvGeometry

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n o y x"]:
        conv = self.geometry
        padding: tuple[int, ...] = conv.padding  # pyright: ignore[reportAssignmentType]
        output_size = []
        for axis, size in enumerate(x.shape[2:]):
            kernel_extent = conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            output_size.append((size + 2 * padding[axis] - kernel_extent) // conv.stride[axis] + 1)
        tokens = super().forward(self.to_tokens(x))  # pyright: ignore[reportAttributeAccessIssue]
        return tokens.mT.unflatten(2, output_size)

    def to_tokens(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n p k"]:
        """Return the patches that the kernel sees, flattened."""
        conv = self.geometry
        return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT  # pyright: ignore[reportArgumentType]
