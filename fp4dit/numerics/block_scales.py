"""Block scales: scales of 8 bits for short blocks, as hardware keeps them.

`E8M0Scale` has the powers of two of OCP Microscaling Formats (MX) v1.0, section 6.3; `NVFP4Scale`
has E4M3 scales under one fp32 scale of the tensor, as NVIDIA's NVFP4. The exponent rules choose the
power of two of a block. Exponents come from frexp, because log2 errs next to powers of two.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fp4dit.numerics.formats import Format, floating
from fp4dit.numerics.qparams import Blocks, PerBlock, Scale
from fp4dit.numerics.scale_rules import Importance, ScaleRule, select_least_error

ExponentRule = Callable[[PerBlock, Format], Int[Tensor, "blocks 1"]]

E4M3 = floating(4, 3, reserved=1)  # OCP's e4m3fn, which has nan but no infinity


def max_magnitude(blocks: Blocks) -> PerBlock:
    """Return the largest magnitude of each block: the range that clips nothing."""
    return blocks.abs().amax(1, keepdim=True)


def max_exponent(fmt: Format) -> int:
    """Return floor(log2 max) of a format."""
    return math.frexp(fmt.max)[1] - 1


def floor_exponent(reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Return floor(log2 reach) - floor(log2 max): OCP's rule.

    It aligns the binade of the reach with the last binade of the format, and clips values above
    the largest code.
    """
    return torch.frexp(reach).exponent - 1 - max_exponent(fmt)


def ceil_exponent(reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Return ceil(log2 reach) - floor(log2 max)."""
    mantissa, exponent = torch.frexp(reach)
    return exponent - (mantissa == 0.5).int() - max_exponent(fmt)


def even_exponent(reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Return `floor_exponent` of the reach rounded to the format's number of mantissa bits.

    It has the least error of the simple rules.
    """
    mantissa = torch.frexp(reach).mantissa
    binade = 2.0 ** max_exponent(fmt)
    # Half a step, as a share of [0.5, 1).
    half_step = fmt.step(reach.new_tensor(binade)) / binade / 4
    return floor_exponent(reach, fmt) + (mantissa >= 1 - half_step).int()


def nearest_ratio_exponent(reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Return round(log2(reach / max))."""
    mantissa, exponent = torch.frexp(reach)
    top, shift = math.frexp(fmt.max)
    return (
        exponent
        - shift
        + (mantissa >= top * math.sqrt(2)).int()
        - (mantissa < top * math.sqrt(0.5)).int()
    )


def floor_ratio_exponent(reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Return floor(log2(reach / max)), which clips up to half of the reach."""
    mantissa, exponent = torch.frexp(reach)
    top, shift = math.frexp(fmt.max)
    return exponent - shift - (mantissa < top).int()


@dataclass(frozen=True)
class CeilRatioExponent:
    """The exponent rule ceil(log2(reach / (overshoot * max))).

    An overshoot of 1 clips nothing (cuBLAS's rule). In E2M1, whose largest code is 6, 7.25 / 6 has
    about the least error (as in the code of AutoRound).

    Attributes:
        overshoot: How far the reach may exceed the largest value of the scaled format, as a factor.

    Example:
        >>> CeilRatioExponent()(torch.tensor([[6.0], [7.0]]), floating(2, 1))
        tensor([[0],
                [1]], dtype=torch.int32)
    """

    overshoot: float = 1.0

    def __call__(self, reach: PerBlock, fmt: Format) -> Int[Tensor, "blocks 1"]:
        mantissa, exponent = torch.frexp(reach)
        top, shift = math.frexp(self.overshoot * fmt.max)
        return exponent - shift + (mantissa > top).int()


@dataclass(frozen=True)
class E8M0Scale:
    """A power of two for each block, from 2^-127 to 2^127, kept in 8 bits (MXFP4, MXFP6, MXFP8).

    A block of zeros has scale 1. A block that holds NaN or infinity has scale NaN, so all its
    values become NaN.

    Attributes:
        round: The rule that chooses the exponent, given the reach of a block and the format.
        factor: A number that multiplies all scales. 4/3 with `floor_exponent` clips nothing
            (arXiv:2505.14669).
        shifts: Exponents to add to the chosen one. Of several, such as (0, -1, 1), the one with the
            least sum of importance * |x - Q(x)|^p is taken.
        reach: The range of a block that should be representable. Some standard deviations in place
            of the largest magnitude clip outliers (arXiv:2505.14669).
        p: Exponent of the error.

    Example:
        >>> E8M0Scale()(torch.tensor([[3.0, -12.0]]), floating(2, 1)).scale
        tensor([[2.]])
    """

    round: ExponentRule = even_exponent
    factor: float = 1.0
    shifts: Sequence[int] = (0,)
    reach: Callable[[Blocks], PerBlock] = max_magnitude
    p: float = 2.0

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        reach = self.reach(blocks)
        exponent = self.round(reach, fmt)
        candidates = (self.make_scale(reach, exponent + shift) for shift in self.shifts)
        return select_least_error(blocks, fmt, candidates, self.p, importance)

    def make_scale(self, reach: PerBlock, exponent: Int[Tensor, "blocks 1"]) -> Scale:
        power = self.factor * torch.ldexp(torch.ones_like(reach), exponent.clamp(-127, 127))
        power = torch.where(reach == 0, 1.0, power)
        return Scale(torch.where(reach.isfinite(), power, float("nan")))

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return 8.0 * blocks


@dataclass(frozen=True)
class NVFP4Scale:
    """An E4M3 scale for each block, times one fp32 scale for the tensor (NVFP4).

    The scale of the tensor is max|tensor| / (top * the format's largest code). A block's candidates
    are the E4M3 numbers nearest to ratio * max|block| / the format's largest code / the scale of
    the tensor; the one with the least sum of importance * |x - Q(x)|^p is taken.

    Attributes:
        top: The E4M3 scale that the block with the largest value gets.
        candidates: The ratios; None tries every positive E4M3 number. top=256 with candidates
            (1.0, 1.5) is "four over six" (arXiv:2512.02010): the block's largest value lands on 6
            or on 4, and 1.5 * 256 is still an E4M3 number.
        p: Exponent of the error.
        min_scale: The least E4M3 scale.
        amax: max|tensor| if it is known beforehand: static, or shared by several tensors.

    Example:
        >>> NVFP4Scale()(torch.randn(8, 16), floating(2, 1)).scale.shape
        torch.Size([8, 1])
    """

    top: float = 448.0
    candidates: Sequence[float] | None = (1.0,)
    p: float = 2.0
    min_scale: float = 2.0**-9
    amax: float | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        tensor = self.tensor_scale(blocks, fmt)
        ideal = max_magnitude(blocks) / fmt.max / tensor
        scales = (Scale(block * tensor) for block in self.candidate_scales(ideal))
        return select_least_error(blocks, fmt, scales, self.p, importance)

    def tensor_scale(self, blocks: Blocks, fmt: Format) -> Float[Tensor, "..."]:
        """Return one number, or one for each block if blocks have formats of their own."""
        amax = blocks.abs().amax() if self.amax is None else blocks.new_tensor(self.amax)
        scale = amax / (self.top * fmt.max)
        return torch.where(scale == 0, 1.0, scale)

    def candidate_scales(self, ideal: PerBlock) -> Iterator[PerBlock]:
        """Yield the E4M3 scales to try, given the scales that would clip nothing."""
        if self.candidates is None:
            values = E4M3.values()
            for value in values[values > 0].tolist():
                yield torch.full_like(ideal, value)
        else:
            for ratio in self.candidates:
                yield E4M3.nearest((ratio * ideal).clamp(self.min_scale, E4M3.max))

    def with_tensor_scale_of(self, blocks: Blocks) -> ScaleRule:
        return replace(self, amax=blocks.abs().amax().item()) if self.amax is None else self

    @property
    def has_free_sign_bit(self) -> bool:
        return True

    def storage_bits(self, fmt: Format, blocks: int) -> float:
        return 8.0 * blocks + 32


@dataclass(frozen=True)
class PowerOfTwoNVFP4Scale(NVFP4Scale):
    """`NVFP4Scale` whose scale of the tensor is a power of two.

    A weight is then a number of bf16 and of fp16, and products of its scales are not rounded in any
    dtype. The power is rounded up, so that no block needs a larger scale than `top`.

    Example:
        >>> PowerOfTwoNVFP4Scale().tensor_scale(torch.full((1, 16), 2688.5), floating(2, 1))
        tensor(2.)
    """

    def tensor_scale(self, blocks: Blocks, fmt: Format) -> Float[Tensor, "..."]:
        mantissa, exponent = torch.frexp(super().tensor_scale(blocks, fmt))
        power = exponent - (mantissa == 0.5).int()
        return torch.ldexp(torch.ones_like(mantissa), power)
