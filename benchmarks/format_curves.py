"""Ratios of signal to noise of 4-bit formats against the tails of the values, by integration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fp4dit.analysis import (
    Distribution,
    GeneralizedNormal,
    StudentT,
    Uniform,
    expected_noise,
    sample_noise,
    to_decibels,
)
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, ELEMENTS
from fp4dit.numerics import E8M0Scale, Format, PerGroup

ROW, TENSOR = 1152, 1_000_000
SIZES = (16, 32, 64, 128, ROW, TENSOR)
SIZE_NAMES = {ROW: "a row", TENSOR: "a tensor"}

GENERALIZED = "generalised normal"
STUDENT = "Student's t"
# From light tails to heavy ones.
FAMILIES: dict[str, Sequence[Distribution]] = {
    GENERALIZED: (
        Uniform(),
        *map(GeneralizedNormal, (4.0, 2.6, 2.0, 1.7, 1.4, 1.2, 1.0, 0.8, 0.65, 0.5)),
    ),
    STUDENT: (
        GeneralizedNormal(2.0),
        *map(StudentT, (40.0, 16.0, 10.0, 8.0, 7.0, 6.0, 5.0, 4.5, 4.27)),
    ),
}

TENSOR_BLOCKS = 4096  # of a tensor that has a scale beside those of its blocks
DEVIATIONS = [2 ** (i / 8) for i in range(8)]  # an octave, over which powers of two are averaged

Ratios = dict[tuple[str, int], float]  # in dB, by format and size of blocks


@dataclass(frozen=True)
class Curve:
    """The ratios of formats along a family of distributions.

    Attributes:
        kurtosis: The excess kurtosis of each distribution.
        ratios: The ratios in dB for each distribution.
    """

    kurtosis: Sequence[float]
    ratios: Sequence[Ratios]

    def points(self, name: str, size: int) -> list[tuple[float, float]]:
        """Return kurtosis and ratio of a format along the family."""
        key = (name, size)
        return [(k, r[key]) for k, r in zip(self.kurtosis, self.ratios, strict=True)]

    def differences(self, name: str, other: str, size: int) -> list[tuple[float, float]]:
        """Return kurtosis and by how much a format exceeds another one along the family."""
        pairs = zip(self.points(name, size), self.points(other, size), strict=True)
        return [(k, a - b) for (k, a), (_, b) in pairs]

    def predict(self, name: str, size: int, kurtosis: float) -> float:
        """Return the ratio at a kurtosis, interpolated linearly."""
        points = self.points(name, size)
        return float(np.interp(kurtosis, [k for k, _ in points], [r for _, r in points]))

    def find_crossing(self, name: str, other: str, size: int) -> float | None:
        """Return the kurtosis from which on a format is ahead of another one.

        Returns:
            The kurtosis; -inf if it is ahead along the whole family, None if it nowhere is.
        """
        points = self.differences(name, other, size)
        if points[0][1] > 0:
            return -np.inf
        for (k0, d0), (k1, d1) in pairwise(points):
            if d0 <= 0 < d1:
                return k0 + (k1 - k0) * -d0 / (d1 - d0)
        return None


def compute_curves() -> dict[str, Curve]:
    """Return the curve of each family."""
    curves = {}
    for family, members in FAMILIES.items():
        ratios = [compute_ratios(member) for member in members]
        curves[family] = Curve([member.kurtosis for member in members], ratios)
    return curves


def compute_ratios(
    distribution: Distribution, sizes: Sequence[int] = SIZES, blocks: bool = True
) -> Ratios:
    """Return the ratios of all formats for a distribution.

    Args:
        distribution: The distribution.
        sizes: The sizes of blocks with fp16 scales.
        blocks: Whether to add the formats with blocks of their own.
    """
    ratios: Ratios = {}
    for size in sizes:
        for name, (fmt, rule) in ELEMENTS.items():
            noise = expected_noise(rule, fmt, distribution, size)
            ratios[name, size] = to_decibels(noise)
    return ratios | (dict(compute_block_ratios(distribution)) if blocks else {})


def compute_block_ratios(distribution: Distribution) -> Iterator[tuple[tuple[str, int], float]]:
    """Yield the ratio of each format with blocks of its own.

    Powers of two as scales are averaged over an octave of deviations. IF4's choice depends on all
    values of a block, which is sampled.
    """
    for name, quantizer in BLOCK_FORMATS.items():
        assert isinstance(quantizer.granularity, PerGroup)
        rule, size = quantizer.scale, quantizer.granularity.size
        if not isinstance(quantizer.format, Format):
            noise = sample_noise(quantizer, distribution, (512, 128), tensors=8).mean
        else:
            deviations = DEVIATIONS if isinstance(rule, E8M0Scale) else [1.0]
            noise = np.mean(
                [
                    expected_noise(
                        rule, quantizer.format, distribution, size, TENSOR_BLOCKS, deviation
                    )
                    for deviation in deviations
                ]
            )
        yield (name, size), to_decibels(float(noise))


def name_size(size: int) -> str:
    """Return what a size of blocks is called."""
    return SIZE_NAMES.get(size, str(size))


def list_bits(sizes: Sequence[int]) -> dict[tuple[str, int], float]:
    """Return the bits per weight of the formats with fp16 scales, by format and size of blocks."""
    bits = {}
    for size in sizes:
        for name, (fmt, rule) in ELEMENTS.items():
            bits[name, size] = fmt.bits + rule.storage_bits(fmt, 1) / size
    return bits
