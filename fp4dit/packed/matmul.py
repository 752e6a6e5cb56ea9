"""Products with packed weights: what ways there are, and which is taken where.

A weight of FP4 is exact in FP8 E4M3, and so are activations of E4M3, E2M3, E3M2 and E2M1. Their products are exact in
the tensor cores of sm_89 and later, and what remains of the simulation's rounding is that of fp32 sums.
"""

import logging
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.blockscales import E4M3
from fp4dit.formats import NumberFormat
from fp4dit.packed import speeds
from fp4dit.packed.layout import Layout
from fp4dit.packed.tokens import token_format
from fp4dit.scaling import Scale

if TYPE_CHECKING:
    from fp4dit.packed.layer import PackedLinear

log = logging.getLogger(__name__)

WIDEST = 16384  # columns of a row that one program of the kernel which quantizes rows holds in its registers


@runtime_checkable
class Backend(Protocol):
    """A way to multiply. It is given the input before `layer.activation` quantizes it. `for_few` says whether it is a
    good one for few rows, where reading the weight is what takes time."""

    name: str
    for_few: bool

    def takes(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> bool: ...
    def __call__(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]: ...


class Dequantize:
    """The weight in the model's dtype, for as long as the product takes: anywhere, and to the bit as simulated."""

    name, for_few = "dequantize", True

    def takes(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> bool:
        return True

    def __call__(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        return F.linear(layer.activation(x), layer.dense(layer.dtype), layer.bias)


class WeightOnly:
    """The weight is expanded and scaled in registers."""

    name, for_few = "weight_only", True

    def takes(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> bool:
        return x.is_cuda and expandable(layer.layout, layer.in_features)

    def __call__(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed import kernels  # which needs triton

        rows = layer.activation(x).flatten(0, -2)
        made = kernels.weight_only_matmul(rows, layer.codes, shift(layer.layout), folded(layer), layer.bias)
        return made.unflatten(0, x.shape[:-1])


class Fp8:
    """Tokens quantized online to numbers that E4M3 holds, times the weight, in the tensor cores for FP8."""

    name, for_few = "fp8", False

    def takes(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> bool:
        recent = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 9)
        fmt = token_format(layer.activation)
        fits = layer.in_features <= WIDEST and expandable(layer.layout, layer.in_features)
        return recent and fits and fmt is not None and in_e4m3(fmt)

    def __call__(self, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        from fp4dit.packed import kernels  # which needs triton

        fmt = token_format(layer.activation)
        assert fmt is not None, "ask `takes` first"
        values, scale = kernels.quantize_rows(x.flatten(0, -2), fmt.mantissa, fmt.min_exponent, fmt.max)
        made = kernels.fp8_matmul(values, scale, layer.codes, shift(layer.layout), folded(layer), layer.bias, x.dtype)
        return made.unflatten(0, x.shape[:-1])


BACKENDS: Sequence[Backend] = (Fp8(), WeightOnly(), Dequantize())


def matmul(layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
    """x W^T + bias, with x as the layer's activation quantizes it."""
    ways = [backend for backend in BACKENDS if backend.takes(layer, x)]
    way = ways[0] if len(ways) == 1 else fastest(ways, layer, x)
    if not torch.compiler.is_compiling():
        warn_if_slow(way, layer, x)
    return way(layer, x)


def warn_if_slow(way: Backend, layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> None:
    """Says once for a device that products are slower there than in 16 bits."""
    shape = x.numel() // layer.in_features, layer.out_features, layer.in_features
    name = speeds.device_name(x.device)
    ours, plain = (speeds.milliseconds(name, side, *shape) for side in (way.name, "16-bit"))
    if ours and plain and ours > 1.02 * plain:
        tell_slow(name)


@lru_cache
def tell_slow(device: str) -> None:
    log.warning(
        "on %s packed weights save memory, not time: some of their products take longer than in 16 bits", device
    )


def fastest(ways: Sequence[Backend], layer: "PackedLinear", x: Float[Tensor, "*b k"]) -> Backend:
    """As measured on such a device for about this many rows. Where nobody measured, the first for many rows, and for
    few the one that reads the packed weight."""
    name, m = speeds.device_name(x.device), x.numel() // layer.in_features
    times = [speeds.milliseconds(name, way.name, m, layer.out_features, layer.in_features) for way in ways]
    known = {way: ms for way, ms in zip(ways, times, strict=True) if ms is not None}
    if len(known) == len(ways):
        return min(known, key=lambda way: known[way])
    return ways[0] if m > 64 else next(way for way in ways if way.for_few)


def expandable(layout: Layout, k: int) -> bool:
    """Whether codes become E4M3 by moving bits, with one scale for each row, or for each of some times 128 values."""
    fmt, rest = layout.formats[0], layout.granularity
    fits = rest.unit == "row" or (rest.unit == "group" and rest.group % 128 == 0)
    signed = isinstance(fmt, NumberFormat) and fmt.min < 0 and fmt.bits == 4
    return fits and signed and len(layout.formats) == 1 and set(layout.scaling) == {"scale"} and k % 32 == 0


def shift(layout: Layout) -> int:
    """Places that a code's magnitude moves up to where E4M3 has its mantissa. An INT is E1M2 times a power of two."""
    fmt = layout.formats[0]
    assert isinstance(fmt, NumberFormat)
    return 3 - min(fmt.mantissa, 2)


def folded(layer: "PackedLinear") -> Float[Tensor, "o g"]:
    """The scales of codes that were moved there: of the two largest values, which is the larger by how much."""
    fmt = layer.layout.formats[0]
    exponent, mantissa = divmod(7 << shift(layer.layout), 8)
    largest = math.ldexp(1 + mantissa / 8, exponent - 7)  # which E4M3 makes of these bits
    scaling = layer.scaling
    assert isinstance(scaling, Scale)
    return (scaling.scale * (fmt.max / largest)).view(layer.out_features, -1)


def in_e4m3(fmt: NumberFormat) -> bool:
    """Whether E4M3 holds its values: without looking at them, which torch.compile could not follow."""
    return fmt.mantissa <= E4M3.mantissa and fmt.smallest >= E4M3.smallest and fmt.max <= E4M3.max
