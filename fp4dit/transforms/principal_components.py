"""The principal components of the input in 16 bits, beside a quantized layer (DiRotQ)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.transforms.base import (
    FakeQuantizeFn,
    InputSample,
    Transform,
    WeightMatrix,
    apply_in_fp32,
)


class PrincipalBranch(Transform):
    """Branch that computes with the largest principal components of the input in 16 bits.

    The rows of `down` are the eigenvectors of the inputs' second moment with the largest
    eigenvalues, and x down^T are the coefficients that stay in 16 bits. What is left of the input
    and of the weight is orthogonal to these rows, and is quantized.

    Args:
        out: Number of output channels.
        k: Number of input channels.
        rank: Number of components.

    Example:
        >>> branch = PrincipalBranch(out=32, k=64, rank=8)
        >>> branch.fit(weight, x, quantizer, fake_quantize_input)
        >>> rest, high = branch.transform_input(x), branch.compute_bypass(x)
    """

    down: Float[Tensor, "r k"]
    up: Float[Tensor, "o r"]

    def __init__(self, out: int, k: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("down", torch.zeros(rank, k, dtype=torch.float16))
        self.register_buffer("up", torch.zeros(out, rank, dtype=torch.float16))

    @torch.no_grad()
    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        tokens = x.flatten(0, -2).double()
        moment = tokens.mT @ tokens
        self.down.copy_(torch.linalg.eigh(moment).eigenvectors[:, -len(self.down) :].mT)
        # The rounded rows are not quite orthonormal. Least squares leave nothing of their span.
        down = self.down.double()
        self.up.copy_(weight.double() @ down.mT @ torch.linalg.inv(down @ down.mT))

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        def remove_components(x: Tensor) -> Tensor:
            down = self.down.to(x.dtype)
            return x - F.linear(x, down) @ down

        return apply_in_fp32(remove_components, x)

    def transform_weight(self, w: WeightMatrix) -> WeightMatrix:
        return apply_in_fp32(lambda w: w - self.up.to(w.dtype) @ self.down.to(w.dtype), w)

    def compute_bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        def compute_branch(x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

        return apply_in_fp32(compute_branch, x)


@dataclass(frozen=True)
class PrincipalComponents:
    """The largest principal components of the input stay in 16 bits (DiRotQ, arXiv:2605.16732).

    DiRotQ rotates the input by a stored matrix, U R: the eigenvectors U of its second moment, then
    a random rotation R of all but the largest components. Here the largest are projected out, and a
    Hadamard rotation follows in the chain. Quantization sees the same subspace in another random
    basis, and the components' vectors are stored instead of a K x K matrix.

    The branch rounds what it multiplies by to fp16, so x W^T stays the same but for that rounding.

    Args:
        fraction: Share of the input channels that is the number of components.

    Example:
        >>> branch = PrincipalComponents(0.125)(out=32, k=64)
        >>> branch.storage_bits()  # 16 * 8 * (32 + 64)
        12288.0
    """

    fraction: float = 0.125

    def __call__(self, out: int, k: int) -> PrincipalBranch:
        rank = round(self.fraction * k)
        if not 0 < rank < k:
            raise ValueError(
                f"{self.fraction} of {k} components is {rank} of them: give a fraction that "
                "leaves some to each side."
            )
        return PrincipalBranch(out, k, rank)
