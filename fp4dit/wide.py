"""Products of bfloat16 matrices on processors that have no instructions for them.

There torch falls back on loops, and the product of a gradient takes fifty times as long as in fp32. Computed in fp32
and rounded, results are those of such instructions, which sum in fp32 too, but for the order of the sums.
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


def native() -> bool:
    """Whether this processor multiplies bfloat16, by what torch asks oneDNN for the same end."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Wide(TorchDispatchMode):
    """Computes the products of bfloat16 inside the block in fp32, and rounds them."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **given)
        given = {name: widened(value) for name, value in given.items()}
        found = func(*map(widened, args), **given)
        if not isinstance(found, tuple):
            return found.bfloat16()
        if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
            return found[0].bfloat16(), found[1]  # the logarithms of its sums are fp32 anyway
        return tuple(each if each is None else each.bfloat16() for each in found)


def widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


class WideMixedPrecision(MixedPrecision):
    """Lightning's `bf16-mixed` on the CPU, with products that are `Wide`."""

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        with super().forward_context(), Wide():
            yield

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        with Wide():
            super().backward(tensor, model, optimizer, *args, **kwargs)
