"""Products of bfloat16 matrices on processors without instructions for them.

On such processors torch falls back on loops, and the product of a gradient takes fifty times as
long as in fp32. A product that is computed in fp32 and then rounded differs only by the order of
summation from that of bfloat16 instructions, which accumulate in fp32 too.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

PRODUCTS = {
    *(aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default),
    *(aten.convolution.default, aten.convolution_backward.default),
    *(aten._scaled_dot_product_flash_attention_for_cpu.default,),
    *(aten._scaled_dot_product_flash_attention_for_cpu_backward.default,),
}


def cpu_has_bf16_matmul() -> bool:
    """Return whether this processor has bfloat16 products, by torch's own query of oneDNN."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class EmulateBf16Matmul(TorchDispatchMode):
    """Context manager: compute products of bfloat16 in fp32, and round them.

    Example:
        >>> with EmulateBf16Matmul():
        ...     y = a.bfloat16() @ b.bfloat16()
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        kwargs = {name: to_fp32(value) for name, value in kwargs.items()}
        output = func(*map(to_fp32, args), **kwargs)
        if not isinstance(output, tuple):
            return output.bfloat16()
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return output[0].bfloat16(), output[1]  # The log-sum-exp is fp32 in any case.
        return tuple(tensor if tensor is None else tensor.bfloat16() for tensor in output)


def to_fp32(value: Any) -> Any:
    """Return a bfloat16 tensor in fp32, and anything else unchanged."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class Bf16EmulatedMixedPrecision(MixedPrecision):
    """Lightning's `bf16-mixed` on the CPU with emulated products. See `EmulateBf16Matmul`.

    Example:
        >>> trainer = lightning.Trainer(plugins=[Bf16EmulatedMixedPrecision()])
    """

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with super().forward_context(), EmulateBf16Matmul():
            yield

    def backward(
        self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        with EmulateBf16Matmul():
            super().backward(tensor, model, optimizer, *args, **kwargs)
