"""Backends that multiply by a packed 4-bit weight with Triton kernels, on a GPU.

A weight in E2M1, E1M2, E3M0 or INT4 is exact in FP8 E4M3 and, times a power of two, in int8. So are
tokens in formats of few bits. Tensor cores multiply both exactly, so that the result differs from
the simulation only in the rounding of fp32 sums.
"""

import math
from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.quantizer import PerGroup, PerRow
from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.nn.base import PackedWeight, is_inference
from fp4dit.packed.nn.byte_numbers import (
    E4M3_NUMBERS,
    INT8_NUMBERS,
    ByteNumbers,
)
from fp4dit.packed.nn.limits import MAX_ROW_VALUES
from fp4dit.packed.nn.token_quant import fast_token_format

Capability = tuple[int, int]  # of a GPU, such as (8, 9) for sm_89


class WeightOnlyBackend:
    """Triton kernel that expands and scales a 4-bit weight in registers.

    It needs the tensor cores of sm_80 and later. On GPUs before it, expanding the weight for
    cuBLAS is faster.

    Example:
        >>> x = torch.zeros(3, packed_layer.in_features)  # on the CPU
        >>> WeightOnlyBackend().supports(packed_layer, x)
        False
    """

    name, min_rows = "weight_only", 0

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        if not x.is_cuda or not is_inference(layer, x):
            return False
        has_cores = torch.cuda.get_device_capability(x.device) >= (8, 0)
        return has_cores and can_expand_codes(layer.layout, layer.in_features)

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed.nn import triton_ops  # imports Triton, which not every machine has

        rows = layer.input_fake_quant(x).flatten(0, -2)
        scale = fold_unit(layer, find_e4m3_unit(layer.layout))
        y = triton_ops.weight_only_matmul(
            rows, layer.codes, find_shift(layer.layout), scale, layer.bias
        )
        return y.unflatten(0, x.shape[:-1])


class TensorCoreBackend(ABC):
    """Triton kernels that quantize tokens to numbers of one byte, for the tensor cores of these.

    With fewer than `min_rows` rows, reading the weight takes most of the time, so that a faster
    product does not make up for the separate kernel that quantizes the tokens.
    """

    name: str
    numbers: ByteNumbers
    min_rows = 65

    @abstractmethod
    def has_cores(self, capability: Capability) -> bool:
        """Return whether Triton multiplies such numbers by tensor cores, at their full speed."""

    @abstractmethod
    def find_weight_unit(self, layout: Layout) -> float:
        """Return the value of a weight that the number 1 stands for."""

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        if not x.is_cuda or not is_inference(layer, x) or layer.in_features > MAX_ROW_VALUES:
            return False
        fmt = fast_token_format(layer.input_fake_quant)
        if fmt is None or not self.numbers.hold(fmt):
            return False
        has_cores = self.has_cores(torch.cuda.get_device_capability(x.device))
        return has_cores and can_expand_codes(layer.layout, layer.in_features)

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed.nn import triton_ops  # imports Triton, which not every machine has

        fmt = fast_token_format(layer.input_fake_quant)
        assert fmt is not None, "call `supports` first"
        values, x_scale = triton_ops.quantize_rows(
            x.flatten(0, -2), fmt.mantissa, fmt.min_exponent, fmt.max, self.numbers.dtype
        )
        scale = fold_unit(layer, self.find_weight_unit(layer.layout))
        y = triton_ops.quantized_matmul(
            values, x_scale, layer.codes, find_shift(layer.layout), scale, layer.bias, x.dtype
        )
        return y.unflatten(0, x.shape[:-1])


class Int8Backend(TensorCoreBackend):
    """Product of whole numbers in the INT8 tensor cores of sm_80 and later.

    Its sums are exact within a group. The result has the same bits on every GPU, and in fp32 those
    of `IntegerBackend` on a CPU. On sm_100 and its kin Triton 3.6 has no INT8 but that of sm_80,
    which is slow there.

    Example:
        >>> x = torch.zeros(128, packed_layer.in_features)  # on the CPU
        >>> Int8Backend().supports(packed_layer, x)
        False
    """

    name, numbers = "int8", INT8_NUMBERS

    def has_cores(self, capability: Capability) -> bool:
        return capability[0] in (8, 9, 12)

    def find_weight_unit(self, layout: Layout) -> float:
        return self.numbers.find_unit(find_code_format(layout))


class Fp8Backend(TensorCoreBackend):
    """Product of values of E4M3 in the FP8 tensor cores of sm_89 and later.

    Example:
        >>> x = torch.zeros(128, packed_layer.in_features)  # on the CPU
        >>> Fp8Backend().supports(packed_layer, x)
        False
    """

    name, numbers = "fp8", E4M3_NUMBERS

    def has_cores(self, capability: Capability) -> bool:
        return capability >= (8, 9)

    def find_weight_unit(self, layout: Layout) -> float:
        return find_e4m3_unit(layout)


def can_expand_codes(layout: Layout, k: int) -> bool:
    """Return whether a kernel can expand the codes in registers.

    This needs one signed 4-bit format, one scale for each row or for each multiple of 128 values,
    and rows of a multiple of 32 values.
    """
    fmt, granularity = layout.formats[0], layout.granularity
    if not isinstance(fmt, NumberFormat) or len(layout.formats) > 1:
        return False
    has_wide_groups = isinstance(granularity, PerGroup) and granularity.size % 128 == 0
    if not (isinstance(granularity, PerRow) or has_wide_groups):
        return False
    if set(layout.encodings) != {"scale"}:
        return False
    return fmt.min < 0 and fmt.bits == 4 and k % 32 == 0


def find_code_format(layout: Layout) -> NumberFormat:
    """Return the format of a weight whose codes can be expanded."""
    fmt = layout.formats[0]
    assert isinstance(fmt, NumberFormat)
    return fmt


def find_shift(layout: Layout) -> int:
    """Return by how many bits a code's magnitude is shifted up to the mantissa of E4M3.

    It tells the kernels the format. The values of INT4 are those of E1M2 times a power of two, so
    it is shifted like E1M2.
    """
    return 3 - min(find_code_format(layout).mantissa, 2)


def find_e4m3_unit(layout: Layout) -> float:
    """Return the factor between a value and its shifted code in E4M3."""
    exponent, mantissa = divmod(7 << find_shift(layout), 8)
    shifted_max = math.ldexp(1 + mantissa / 8, exponent - 7)  # the largest magnitude, 7, in E4M3
    return find_code_format(layout).max / shifted_max


def fold_unit(layer: PackedWeight, unit: float) -> Float[Tensor, "o g"]:
    """Return the weight's scales times the value that the number 1 stands for."""
    qparams = layer.qparams
    assert isinstance(qparams, Scale)
    return (qparams.scale * unit).view(layer.out_features, -1)
