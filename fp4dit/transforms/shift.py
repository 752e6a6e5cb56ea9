"""A shift that makes inputs positive, so that an unsigned format holds them."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.transforms.base import (
    FakeQuantizeFn,
    InputSample,
    Transform,
    WeightMatrix,
    apply_in_fp32,
)


class ShiftedInput(Transform):
    """Add a number to all inputs, and take its product with the weight from the output.

    The product is kept in 16 bits, as the bias that it could be a part of.

    Args:
        out: Number of output channels.
        by: What is added to each input.

    Example:
        >>> transform = ShiftedInput(out=32, by=0.25)
        >>> transform.fit(weight, x, quantizer, fake_quantize_input)
        >>> correction = transform.compute_bypass(x)  # -0.25 times the sum of each row of W
    """

    product: Float[Tensor, "o"]

    def __init__(self, out: int, by: float) -> None:
        super().__init__()
        self.by = by
        self.register_buffer("product", torch.zeros(out, dtype=torch.float16))

    @torch.no_grad()
    def fit(
        self,
        weight: WeightMatrix,
        x: InputSample,
        quantizer: Quantizer,
        fake_quantize_input: FakeQuantizeFn,
    ) -> None:
        self.product.copy_(self.by * weight.double().sum(1))

    def transform_input(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b k"]:
        return apply_in_fp32(lambda x: x + self.by, x)

    def compute_bypass(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        return -self.product.to(x.dtype).expand(*x.shape[:-1], -1)


@dataclass(frozen=True)
class Shift:
    """A number that is added to all inputs of a layer (SVDQuant, arXiv:2411.05007, its code).

    The least value of GELU is -0.16997. With 0.171875, the shift of SVDQuant's authors, its output
    is positive, and an unsigned format spends no code on negative numbers.

    Args:
        by: What is added to each input.

    Example:
        >>> transform = Shift(by=0.171875)(out=32, k=64)
    """

    by: float = 0.171875

    def __call__(self, out: int, k: int) -> ShiftedInput:
        return ShiftedInput(out, self.by)
