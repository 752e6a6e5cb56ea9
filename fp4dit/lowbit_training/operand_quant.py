"""Quantizers of the operands of a product in low-bit training (Quartet, arXiv:2505.14669)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int8, UInt8
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.block_scales import (
    E4M3,
    CeilRatioExponent,
    E8M0Scale,
    ExponentRule,
    NVFP4Scale,
    floor_exponent,
    nearest_ratio_exponent,
)
from fp4dit.numerics.formats import NumberFormat, floating
from fp4dit.numerics.qparams import Blocks, PerBlock
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.rounding import round_stochastically
from fp4dit.numerics.scale_rules import RootMeanSquares
from fp4dit.transforms.hadamard import hadamard_matrix

ROTATION_SIZE = 32  # Values that are rotated together. The group size of each quantizer divides it.

E2M1 = floating(2, 1)

Matrix = Float[Tensor, "m k"]

Alpha = float | Float[Tensor, ""]

Reach = Callable[[Blocks], PerBlock]


class PackedMXFP4(NamedTuple):
    """MXFP4 values: E2M1 codes, and an E8M0 scale for each 32 of them.

    Attributes:
        codes: Two codes per byte, that of the even column in the low half.
        scales: Exponents of the scales, with a bias of 127.
    """

    codes: UInt8[Tensor, "m half"]
    scales: UInt8[Tensor, "m blocks"]


class QuantizedOperand(NamedTuple):
    """Quantized operand of a product, which stands for alpha * values.

    bf16 holds the values of block formats exactly, so a product in bf16 is the one that hardware
    for these formats computes, up to the order of summation.

    Attributes:
        values: Quantized and dequantized values.
        alpha: Factor of the values.
        unclipped: False where a value was clipped; None if no value can be.
        packed: The same values for hardware with block-scaled products, if there is any.
    """

    values: Matrix
    alpha: Alpha
    unclipped: Bool[Tensor, "m k"] | None = None
    packed: PackedMXFP4 | None = None


@runtime_checkable
class OperandQuantizer(Protocol):
    """Protocol of quantizers of an operand's rows.

    The length of a row is a multiple of `ROTATION_SIZE`.

    Example:
        >>> class RoundToBf16:
        ...     stochastic = False
        ...
        ...     def __call__(self, x, generator=None):
        ...         return QuantizedOperand(x.bfloat16().to(x.dtype), alpha=1.0)
        >>> isinstance(RoundToBf16(), OperandQuantizer)
        True
    """

    @property
    def stochastic(self) -> bool:
        """True if values are rounded at random."""
        ...

    def __call__(self, x: Matrix, generator: torch.Generator | None = None) -> QuantizedOperand:
        """Return the operand quantized.

        Args:
            x: Operand.
            generator: Generator of stochastic rounding, on the device of x.
        """
        ...


@dataclass(frozen=True)
class BlockOperandQuantizer:
    """Operand quantizer with scales per block.

    Args:
        quantizer: Format, granularity and scale rule.
        scale_multiplier: Factor of the scales. It is a factor of the product, because E8M0 scales
            cannot hold it.
        magnitude_alignment: Factor of the product that corrects the magnitude that rounding loses
            on average.
        amax: If set, the operand is scaled so that its largest magnitude is `amax`.
        record_clipped: Record which values are clipped.
        stochastic: Round stochastically in place of to nearest.

    Example:
        >>> quantizer = BlockOperandQuantizer(Quantizer(E2M1, PerGroup(32), E8M0Scale()))
        >>> operand = quantizer(torch.randn(8, 64))
    """

    quantizer: Quantizer
    scale_multiplier: float = 1.0
    magnitude_alignment: float = 1.0
    amax: float | None = None
    record_clipped: bool = False
    stochastic: bool = False

    def __call__(self, x: Matrix, generator: torch.Generator | None = None) -> QuantizedOperand:
        fmt, alpha = self.quantizer.format, self.magnitude_alignment * self.scale_multiplier
        assert isinstance(fmt, NumberFormat), "low-bit training only supports number formats"
        if self.amax is not None:
            amax = x.abs().amax()
            divisor = torch.where(amax == 0, 1.0, amax / self.amax)
            x, alpha = x / divisor, alpha * divisor
        blocks = self.quantizer.granularity.split(x)
        qparams = self.quantizer.scale(blocks, fmt)
        if self.scale_multiplier != 1:
            blocks = blocks / self.scale_multiplier
        grid = qparams.to_grid(blocks)
        unclipped = (grid.abs() < fmt.max).view_as(x) if self.record_clipped else None
        if self.stochastic:
            draw = torch.rand(grid.shape, generator=generator, device=x.device, dtype=x.dtype)
            rounded = round_stochastically(grid, fmt, draw)
        else:
            rounded = fmt.nearest_(grid.clamp_(fmt.min, fmt.max))
        return QuantizedOperand(qparams.from_grid(rounded).view_as(x), alpha, unclipped)


def quest_quantizer(
    exponent: ExponentRule = nearest_ratio_exponent,
    reach: Reach = RootMeanSquares(),
    magnitude_alignment: float = 1.0,
) -> BlockOperandQuantizer:
    """Return MXFP4 that clips a block at 2.92 root mean squares (QuEST, arXiv:2502.05003).

    With the nearest power of two as scale, the squared error of Gaussian values is the 0.013 of
    Quartet's table 2. Quartet's released code, which is `floor_ratio_exponent` with
    `StandardDeviations`, differs twice. It rounds the exponent down, which doubles the
    error and clips 7 % of the values. It measures standard deviations, which are too small if the
    mean of a block is not 0, as after the rotation of a block whose first channel is an outlier.

    Args:
        exponent: Rule for the exponent of the scale.
        reach: Largest magnitude of a block that is not clipped.
        magnitude_alignment: See `BlockOperandQuantizer`.
    """
    quantizer = Quantizer(E2M1, PerGroup(32), E8M0Scale(exponent, reach=reach))
    return BlockOperandQuantizer(
        quantizer, magnitude_alignment=magnitude_alignment, record_clipped=True
    )


def absmax_quantizer(
    magnitude_alignment: float = 1.0, stochastic: bool = False
) -> BlockOperandQuantizer:
    """Return MXFP4 with scales of 4/3 of the OCP standard's, so that nothing is clipped.

    Args:
        magnitude_alignment: 1.009276 corrects the mean shrinkage of Gaussian values by rounding
            to nearest. Stochastic rounding does not shrink values.
        stochastic: Round stochastically.
    """
    quantizer = Quantizer(E2M1, PerGroup(32), E8M0Scale(floor_exponent))
    return BlockOperandQuantizer(quantizer, 4 / 3, magnitude_alignment, stochastic=stochastic)


def mxfp8_quantizer() -> BlockOperandQuantizer:
    """Return MXFP8: E4M3 in blocks of 32, scaled by the least power of two that clips nothing.

    This is the recipe of arXiv:2506.08027.
    """
    return BlockOperandQuantizer(Quantizer(E4M3, PerGroup(32), E8M0Scale(CeilRatioExponent())))


def nvfp4_quantizer() -> BlockOperandQuantizer:
    """Return NVFP4: E2M1 in blocks of 16 with E4M3 scales, and one fp32 scale for the operand.

    It records no clipped values, because it clips no more than the rounding of a block's scale
    loses. The fp32 scale depends on all tokens, so processes with a share of a batch each differ a
    little from one process with all of it.
    """
    # The operand's largest value gets the block scale `NVFP4Scale.top` (448, the largest number of
    # E4M3) and the largest code of E2M1, so that the fp32 scale is 1.
    amax = NVFP4Scale.top * E2M1.max
    return BlockOperandQuantizer(Quantizer(E2M1, PerGroup(16), NVFP4Scale(amax=amax)), amax=amax)


@cache
def normalized_hadamard(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "block block"]:
    """Return the orthogonal Hadamard matrix of a block, which is symmetric.

    It is cached on the device, because copying it would wait for the GPU.
    """
    return (hadamard_matrix(ROTATION_SIZE).double() / ROTATION_SIZE**0.5).to(device, dtype)


def rotation_matrix(
    device: torch.device, dtype: torch.dtype, signs: Int8[Tensor, "block"] | None, alpha: Alpha
) -> Float[Tensor, "block block"]:
    """Return signs, rotation and alpha of a block as one matrix.

    Without signs and alpha it is its own inverse.
    """
    matrix = normalized_hadamard(device, dtype) * alpha
    return matrix if signs is None else matrix * signs[:, None]


def rotate_operand(
    x: Matrix, signs: Int8[Tensor, "block"] | None = None, alpha: Alpha = 1.0
) -> Float[Tensor, "m padded"]:
    """Return alpha * x in at least fp32, padded with zeros, and rotated block by block.

    Args:
        x: Operand.
        signs: Signs of the channels of each block before the rotation.
        alpha: Factor of x.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format)
    padding = -x.shape[1] % ROTATION_SIZE
    if padding:
        x = F.pad(x, (0, padding))
    matrix = rotation_matrix(x.device, x.dtype, signs, alpha)
    return (x.reshape(-1, ROTATION_SIZE) @ matrix).view(len(x), -1)
