"""Block formats: scales of 8 bits for short blocks, as hardware keeps them.

Sources: OCP Microscaling Formats (MX) v1.0, section 6.3, for powers of two; NVIDIA's NVFP4 for E4M3 under one
fp32 scale of the tensor. Exponents come from frexp: log2 errs next to powers of two.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fp4dit.formats import Format, floating
from fp4dit.scales import Importance, ScaleRule, least_error
from fp4dit.scaling import Blocks, Column, Scale

Exponent = Callable[[Column, Format], Int[Tensor, "blocks 1"]]
E4M3 = floating(4, 3, reserved=1)  # OCP's e4m3fn, which has nan but no infinity


def largest(blocks: Blocks) -> Column:
    """How far a block reaches if none of it may be clipped."""
    return blocks.abs().amax(1, keepdim=True)


def top_exponent(fmt: Format) -> int:
    """floor(log2 max)"""
    return math.frexp(fmt.max)[1] - 1


def floor(reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """Align the binade of the reach with the format's last one; clips what lies above the largest code (OCP)."""
    return torch.frexp(reach).exponent - 1 - top_exponent(fmt)


def ceil(reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """As `floor`, one higher unless the reach is a power of two."""
    mantissa, exponent = torch.frexp(reach)
    return exponent - (mantissa == 0.5).int() - top_exponent(fmt)


def even(reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """`floor` of the reach rounded to as many mantissa bits as the format has: the least error of the simple rules."""
    mantissa = torch.frexp(reach).mantissa
    binade = 2.0 ** top_exponent(fmt)
    half_step = fmt.step(reach.new_tensor(binade)) / binade / 4  # as a share of [0.5, 1)
    return floor(reach, fmt) + (mantissa >= 1 - half_step).int()


def nearest(reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """round(log2(reach / max))"""
    mantissa, exponent = torch.frexp(reach)
    top, shift = math.frexp(fmt.max)
    return exponent - shift + (mantissa >= top * math.sqrt(2)).int() - (mantissa < top * math.sqrt(0.5)).int()


def below(reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
    """floor(log2(reach / max)); clips what lies above the largest code, up to half of the reach."""
    mantissa, exponent = torch.frexp(reach)
    top, shift = math.frexp(fmt.max)
    return exponent - shift - (mantissa < top).int()


@dataclass(frozen=True)
class Ceiling:
    """The smallest power of two that brings the reach within `overshoot` times the largest code.

    1 clips nothing (cuBLAS's rule). In E2M1, whose largest code is 6, 7.25 / 6 has about the least error.
    """

    overshoot: float = 1.0

    def __call__(self, reach: Column, fmt: Format) -> Int[Tensor, "blocks 1"]:
        mantissa, exponent = torch.frexp(reach)
        top, shift = math.frexp(self.overshoot * fmt.max)
        return exponent - shift + (mantissa > top).int()


@dataclass(frozen=True)
class E8M0:
    """A power of two for each block, from 2^-127 to 2^127: `rule` says which, given how far the block reaches.

    Of its multiples by 2^shift, for each of `shifts`, the one with the least sum of |x - Q(x)|^p is taken: (0, -1, 1)
    is a search. Then comes `factor`, one number for all tensors: 4/3 on `floor` clips nothing (arXiv:2505.14669).
    A `reach` of some standard deviations in place of the largest value is the clipping of the same paper. A block
    that reaches nowhere has scale 1; one that holds NaN or infinity has scale NaN, so all its values become NaN.
    """

    rule: Exponent = even
    factor: float = 1.0
    shifts: Sequence[int] = (0,)
    reach: Callable[[Blocks], Column] = largest
    p: float = 2.0

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        reach = self.reach(blocks)
        exponent = self.rule(reach, fmt)
        answers = [self.scale(reach, exponent + shift) for shift in self.shifts]
        if len(answers) == 1:
            return answers[0]
        return least_error(blocks, fmt, answers, self.p, importance)

    def scale(self, reach: Column, exponent: Int[Tensor, "blocks 1"]) -> Scale:
        power = self.factor * torch.ldexp(torch.ones_like(reach), exponent.clamp(-127, 127))
        power = torch.where(reach == 0, 1.0, power)
        return Scale(torch.where(reach.isfinite(), power, float("nan")))

    def cost(self, fmt: Format, blocks: int) -> float:
        return 8.0 * blocks


@dataclass(frozen=True)
class NVFP4:
    """An E4M3 number for each block times one fp32 number for the tensor, amax / (top * the format's largest code).

    A block's candidates are E4M3's nearest to ratio * amax / the format's largest code, for each ratio of
    `candidates`, and at least `min_scale`; None tries every positive E4M3 number. The least sum of |x - Q(x)|^p wins.
    top=256.0 with candidates (1.0, 1.5) is "four over six": the block's largest value lands on 6 or on 4, and 1.5 * 256
    is still an E4M3 number. `amax` is the tensor's where it is known beforehand: static, or shared by tensors that
    one multiplication takes.
    """

    top: float = 448.0
    candidates: Sequence[float] | None = (1.0,)
    p: float = 2.0
    min_scale: float = 2.0**-9
    amax: float | None = None

    def __call__(self, blocks: Blocks, fmt: Format, importance: Importance | None = None) -> Scale:
        tensor = self.tensor_scale(blocks, fmt)
        answers = (Scale(code * tensor) for code in self.codes(largest(blocks) / fmt.max / tensor))
        if self.candidates is not None and len(self.candidates) == 1:
            return next(answers)
        return least_error(blocks, fmt, answers, self.p, importance)

    def tensor_scale(self, blocks: Blocks, fmt: Format) -> Float[Tensor, "..."]:
        """One number, or, where blocks have formats of their own, one for each block."""
        amax = blocks.abs().amax() if self.amax is None else blocks.new_tensor(self.amax)
        scale = amax / (self.top * fmt.max)
        return torch.where(scale == 0, 1.0, scale)

    def codes(self, ideal: Column) -> Iterator[Column]:
        if self.candidates is None:
            codes = E4M3.values()
            yield from (torch.full_like(ideal, code) for code in codes[codes > 0].tolist())
        else:
            yield from (E4M3.nearest((ratio * ideal).clamp(self.min_scale, E4M3.max)) for ratio in self.candidates)

    def anchored(self, blocks: Blocks) -> ScaleRule:
        return replace(self, amax=blocks.abs().amax().item()) if self.amax is None else self

    def cost(self, fmt: Format, blocks: int) -> float:
        return 8.0 * blocks + 32
