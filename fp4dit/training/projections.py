"""Projections: what becomes of the operands of a product in low-bit training (Quartet, arXiv:2505.14669)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor
from torch.nn import functional as F

from fp4dit.blockscales import E4M3, E8M0, NVFP4, Ceiling, Exponent, floor, nearest
from fp4dit.formats import NumberFormat, floating
from fp4dit.hadamard import matrix
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.rounding import at_random
from fp4dit.scales import RootMeanSquares
from fp4dit.scaling import Blocks, Column

BLOCK = 32  # values that are rotated together; every group of a projection divides it
E2M1 = floating(2, 1)
Matrix = Float[Tensor, "m k"]
Gain = float | Float[Tensor, ""]
Reach = Callable[[Blocks], Column]


class Packed(NamedTuple):
    """E2M1, two codes a byte with the even column in the low half, and the exponents of E8M0 for 32 of them."""

    codes: UInt8[Tensor, "m half"]
    scales: UInt8[Tensor, "m blocks"]


class Projected(NamedTuple):
    """`gain * values` stands for the operand. bf16 holds the values of block formats exactly, so that a product in
    bf16 is the one that hardware for these formats makes; where there is some, they are `packed` for it, too. `kept` is
    False where a value was clipped; None if none can be."""

    values: Matrix
    gain: Gain
    kept: Bool[Tensor, "m k"] | None = None
    packed: Packed | None = None


@runtime_checkable
class Projection(Protocol):
    """Quantizes the rows of an operand, whose length is a multiple of `BLOCK`."""

    @property
    def stochastic(self) -> bool: ...

    def __call__(self, x: Matrix, generator: torch.Generator | None = None) -> Projected:
        """`generator`, on the device of x, is what a stochastic one draws from."""
        ...


@dataclass(frozen=True)
class Rounded:
    """Rounds by a quantizer, to nearest or `stochastic`ally.

    Scales are `widen` times what the quantizer chooses: a factor of the product, for E8M0 cannot hold it, as is
    `align`, which makes up for what rounding takes from the values' length. With `amax` the quantizer sees the operand
    as if its largest magnitude were that. One that is `masked` tells what it clipped.
    """

    quantizer: Quantizer
    widen: float = 1.0
    align: float = 1.0
    amax: float | None = None
    masked: bool = False
    stochastic: bool = False

    def __call__(self, x: Matrix, generator: torch.Generator | None = None) -> Projected:
        fmt, gain = self.quantizer.format, self.align * self.widen
        assert isinstance(fmt, NumberFormat), "training has formats of numbers alone"
        if self.amax is not None:
            amax = x.abs().amax()
            unit = torch.where(amax == 0, 1.0, amax / self.amax)
            x, gain = x / unit, gain * unit
        blocks = self.quantizer.granularity.split(x)
        scaling = self.quantizer.scale(blocks, fmt)
        grid = scaling.to_grid(blocks if self.widen == 1 else blocks / self.widen)
        kept = (grid.abs() < fmt.max).view_as(x) if self.masked else None
        if self.stochastic:
            draw = torch.rand(grid.shape, generator=generator, device=x.device, dtype=x.dtype)
            rounded = at_random(grid, fmt, draw)
        else:
            rounded = fmt.nearest_(grid.clamp_(fmt.min, fmt.max))
        return Projected(scaling.from_grid(rounded).view_as(x), gain, kept)


def quest(exponent: Exponent = nearest, reach: Reach = RootMeanSquares(), align: float = 1.0) -> Rounded:
    """MXFP4 that reaches 2.92 root mean squares of a block, and clips the rest (QuEST, arXiv:2502.05003).

    With `nearest` the scale is the nearest power of two, and the error for Gaussian values the 0.013 that Quartet's
    table 2 states. Its code takes the power `below`, at twice that error and with 7 % of the values clipped, and
    `Deviations`, which lose blocks that are far from zero: rotated, those whose first channel is an outlier.
    """
    rule = E8M0(exponent, reach=reach)
    return Rounded(Quantizer(E2M1, Granularity("group", 32), rule), align=align, masked=True)


def absmax(align: float = 1.0, stochastic: bool = False) -> Rounded:
    """MXFP4 whose scales are 4/3 of OCP's, so that nothing is clipped.

    `align` = 1.009276 makes up for the mean shrinking of Gaussian values under rounding to nearest; stochastic rounding
    shrinks nothing.
    """
    return Rounded(Quantizer(E2M1, Granularity("group", 32), E8M0(floor)), 4 / 3, align, stochastic=stochastic)


def mxfp8() -> Rounded:
    """MXFP8: E4M3 in blocks of 32, with the smallest power of two that clips nothing as scale (arXiv:2506.08027)."""
    return Rounded(Quantizer(E4M3, Granularity("group", 32), E8M0(Ceiling())))


def nvfp4() -> Rounded:
    """NVFP4: E2M1 in blocks of 16 with an E4M3 scale, under one fp32 scale of the operand.

    Masks nothing: it clips no more than a block's scale lost when it was rounded. The fp32 scale depends on all tokens,
    so processes with a share of a batch each differ a little from one with all of it.
    """
    amax = NVFP4.top * E2M1.max
    return Rounded(Quantizer(E2M1, Granularity("group", 16), NVFP4(amax=amax)), amax=amax)


@cache
def hadamard(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "block block"]:
    """Orthogonal and symmetric. Kept on the device, for its copying would wait for a GPU."""
    return (matrix(BLOCK).double() / BLOCK**0.5).to(device, dtype)


def turn(
    device: torch.device, dtype: torch.dtype, signs: Int8[Tensor, "block"] | None, gain: Gain
) -> Float[Tensor, "block block"]:
    """Signs, rotation and gain in one small matrix. Without signs it is, but for the gain, its own inverse."""
    matrix = hadamard(device, dtype) * gain
    return matrix if signs is None else matrix * signs[:, None]


def turned(x: Matrix, signs: Int8[Tensor, "block"] | None = None, gain: Gain = 1.0) -> Float[Tensor, "m padded"]:
    """gain * x in at least fp32, the rows filled up with zeros, given signs and rotated block by block."""
    x = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
    if rest := -x.shape[1] % BLOCK:
        x = F.pad(x, (0, rest))
    return (x.reshape(-1, BLOCK) @ turn(x.device, x.dtype, signs, gain)).view(len(x), -1)
