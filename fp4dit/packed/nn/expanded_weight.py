"""Weights expanded to numbers of one byte, for the products of the vendor's libraries."""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fp4dit.numerics.formats import NumberFormat
from fp4dit.packed.nn.byte_numbers import E4M3_NUMBERS, INT8_NUMBERS, ByteNumbers
from fp4dit.utils.modules import DtypePreservingModule

LEAST_TOKENS = 17  # of `torch._int_mm` on a GPU


class ExpandedWeight(DtypePreservingModule, ABC):
    """A weight as numbers of one byte, with the value of the number 1 in each group.

    Both are buffers that are not saved. Each group of columns is a product of its own, whose sums
    are scaled and added up in fp32, in order.

    Args:
        values: The weight over the scales of its groups: values of the format.
        fmt: The format. `byte_numbers` holds it.
        scale: The scales.

    Example:
        >>> weight = ExpandedInt8(values, floating(2, 1), scale)
        >>> weight.multiply(tokens, token_scale, None, torch.float32).shape
        torch.Size([2, 64])
    """

    byte_numbers: ByteNumbers
    numbers: Tensor
    unit: Float32[Tensor, "groups o"]

    def __init__(
        self, values: Float[Tensor, "o k"], fmt: NumberFormat, scale: Float32[Tensor, "o groups"]
    ) -> None:
        super().__init__()
        unit = self.byte_numbers.find_unit(fmt)
        groups = values.unflatten(1, (scale.shape[1], -1)).transpose(0, 1)
        numbers = (groups / unit).to(self.byte_numbers.dtype, memory_format=torch.contiguous_format)
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("unit", (scale * unit).T.contiguous(), persistent=False)

    @abstractmethod
    def is_fast_on(self, capability: tuple[int, int] | None) -> bool:
        """Return whether a GPU has tensor cores for such numbers; None stands for a CPU."""

    @abstractmethod
    def multiply_group(self, x: Tensor, numbers: Tensor) -> Tensor:
        """Return x W^T for one group, in fp32 or int32."""

    def supports(self, x: Float[Tensor, "*b k"]) -> bool:
        """Return whether the tokens are enough, and their device multiplies such numbers."""
        if x.numel() < LEAST_TOKENS * x.shape[-1]:
            return False
        if x.is_cuda:
            return self.is_fast_on(torch.cuda.get_device_capability(x.device))
        return x.is_cpu and self.is_fast_on(None)

    def multiply(
        self,
        tokens: Tensor,
        token_unit: Float32[Tensor, "m"],
        bias: Float[Tensor, "o"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "m o"]:
        """Return x W^T + bias.

        Args:
            tokens: Numbers of the tokens, m x k.
            token_unit: The value of the number 1 in each token.
            dtype: The dtype of the product.
        """
        total = torch.zeros((), device=tokens.device)
        groups = tokens.unflatten(1, (len(self.numbers), -1)).transpose(0, 1)
        for x, numbers, unit in zip(groups, self.numbers, self.unit, strict=True):
            total = total + self.multiply_group(x.contiguous(), numbers).float() * unit
        total = total * token_unit[:, None]
        return (total if bias is None else total + bias.float()).to(dtype)


class ExpandedInt8(ExpandedWeight):
    """A weight as whole numbers. Its sums are exact within a group.

    Without a compiler that fuses operations, the product in fp32 has the bits of `IntegerBackend`
    on every device.

    Example:
        See `ExpandedWeight`.
    """

    byte_numbers = INT8_NUMBERS

    def is_fast_on(self, capability: tuple[int, int] | None) -> bool:
        if capability is None:
            return True
        return capability >= (7, 5) and capability != (10, 3)  # sm_103 has next to none

    def multiply_group(self, x: Tensor, numbers: Tensor) -> Tensor:
        return torch._int_mm(x, numbers.T)


class ExpandedFp8(ExpandedWeight):
    """A weight as values of E4M3.

    Example:
        See `ExpandedWeight`.
    """

    byte_numbers = E4M3_NUMBERS

    def is_fast_on(self, capability: tuple[int, int] | None) -> bool:
        return capability is not None and capability >= (8, 9)  # oneDNN emulates it value by value

    def multiply_group(self, x: Tensor, numbers: Tensor) -> Tensor:
        one = torch.ones((), device=x.device)
        # Fast accumulation would keep about 14 bits of the sum of a whole group.
        return torch._scaled_mm(
            x, numbers.T, one, one, out_dtype=torch.float32, use_fast_accum=False
        )
