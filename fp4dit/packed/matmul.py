"""Products with packed weights: what there is, and which is taken where."""

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from fp4dit.packed.layer import PackedLinear


def matmul(layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
    return dequantize(layer, x)


def dequantize(layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
    """The weight as the model's dtype has it, for as long as the product takes: anywhere, and equal to the bit to what
    was simulated."""
    x = layer.activation(x)
    return F.linear(x, layer.dense(layer.dtype), layer.bias)
