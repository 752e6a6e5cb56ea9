"""What a packed layer and a backend of its products are."""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.qparams import QParams
from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.nn.expanded_weight import ExpandedWeight
from fp4dit.packed.nn.token_quant import needs_gradient


class PackedWeight(nn.Module):
    """Attributes of a packed layer that backends read. `PackedLinear` is the implementation.

    Attributes:
        layout: Layout of the packed buffers.
        codes: Packed codes, with one row for each output.
        bias: Bias in the model's dtype, or None.
        dtype: Dtype that the weight is dequantized to.
        in_features: Number of inputs, k.
        out_features: Number of outputs, o.
        input_fake_quant: `FakeQuantize` of the input, or the identity.
        expanded: The weight in numbers of one byte, or None if it was not expanded.

    Example:
        >>> packed = pack_layer(quant_layer)  # a `QuantLayer` whose weight is committed
        >>> packed.dequantize(torch.float32).equal(quant_layer.weight)
        True
    """

    layout: Layout
    codes: UInt8[Tensor, "o b"]
    bias: Tensor | None
    dtype: torch.dtype
    in_features: int
    out_features: int
    input_fake_quant: nn.Module
    expanded: ExpandedWeight | None

    @property
    def packed_buffers(self) -> dict[str, UInt8[Tensor, "..."]]:
        """The buffers of `layout`, by name."""
        raise NotImplementedError

    @property
    def qparams(self) -> QParams:
        """The qparams of the weight in fp32."""
        raise NotImplementedError

    def dequantize(self, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        """Return the weight in `dtype`."""
        raise NotImplementedError

    def decode_values(self) -> Float[Tensor, "o k"]:
        """Return the weight over its scales, in fp32: values of the format."""
        raise NotImplementedError


@runtime_checkable
class Backend(Protocol):
    """Implementation of x W^T + bias for a packed weight.

    `x` is the input before `layer.input_fake_quant` quantizes it. `min_rows` is the least number of
    rows that the backend is chosen for.

    Example:
        >>> DequantizeBackend().supports(packed_layer, torch.zeros(3, packed_layer.in_features))
        True
    """

    name: str
    min_rows: int

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        """Return whether this layer, input and device can be computed."""
        ...

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        """Return the product. Call `supports` first."""
        ...


def is_inference(layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
    """Return whether autograd has to see nothing of a product."""
    return not needs_gradient(x) and (layer.bias is None or not needs_gradient(layer.bias))
