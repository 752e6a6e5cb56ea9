"""Expected squared error of rounding to nearest, integrated over a distribution of values.

A block of n independent values with the distribution F of magnitudes has an absmax below a with
probability F(a)^n. Given the absmax, its sign is either, and the n - 1 other values are independent
and truncated to [-a, a]. A scale rule that looks at the absmax alone fixes the levels, and between
two midpoints of levels the error is a difference of the first three partial moments. What is left
to integrate numerically is the absmax: over p = F(a)^n in [0, 1] with the substitution
p = 1 / (1 + exp(-y)), for which the trapezoidal rule converges exponentially. The least and the
largest value of a block take the place of the absmax where there is a zero point.

`expected_noise.register` adds a scale rule. The scales are those that the rule itself returns.
"""

from dataclasses import replace
from functools import singledispatch

import numpy as np
import torch
from jaxtyping import Float

from fp4dit.analysis.distributions import Distribution
from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale, max_magnitude
from fp4dit.numerics.codebook import Codebook
from fp4dit.numerics.formats import Format, NumberFormat
from fp4dit.numerics.scale_rules import AbsMax, MinMax, ScaleRule

Nodes = Float[np.ndarray, "n"]

Levels = Float[np.ndarray, "#n v"]

RANGE = (-30.0, 90.0)  # of y: beyond, even the tail of Student's t adds less than 1e-8

# The steps of y. Where scales are rounded, the integrand jumps, and small steps average the jumps.
SMOOTH, ROUNDED, BLOCKS, TENSOR, CORNERS = 0.25, 0.02, 0.1, 1.0, 0.25


@singledispatch
def expected_noise(
    rule: ScaleRule,
    fmt: Format,
    distribution: Distribution,
    size: int,
    blocks: int = 1,
    deviation: float = 1.0,
) -> float:
    """Return the expected squared error of a value as a share of the variance.

    Args:
        rule: The scale rule.
        fmt: The number format.
        distribution: The distribution of all values, which are independent.
        size: The number of values of a block.
        blocks: The number of blocks of a tensor, which matters to rules with a tensor scale.
        deviation: The standard deviation of the values, which matters to rules with powers of two.

    Raises:
        ValueError: if the scales depend on more than the extremes of a block, or if the format is
            not rounded value by value. `sample_noise` measures these.

    Example:
        >>> 10 * math.log10(1 / expected_noise(AbsMax(), floating(2, 1), StudentT(6.0), 128))
        18.4...
    """
    raise ValueError(
        f"the scales of {type(rule).__name__} depend on more than the extremes of a block: use "
        "sample_noise"
    )


@expected_noise.register
def absmax_noise(
    rule: AbsMax,
    fmt: Format,
    distribution: Distribution,
    size: int,
    blocks: int = 1,
    deviation: float = 1.0,
) -> float:
    """Integrate over the absmax."""
    return integrate_over_absmax(rule, fmt, distribution, size, deviation, SMOOTH)


@expected_noise.register
def e8m0_noise(
    rule: E8M0Scale,
    fmt: Format,
    distribution: Distribution,
    size: int,
    blocks: int = 1,
    deviation: float = 1.0,
) -> float:
    """Integrate over the absmax, in steps that are small beside an octave."""
    if rule.reach is not max_magnitude or len(rule.shifts) > 1:
        raise ValueError("E8M0Scale with a reach or with several shifts: use sample_noise")
    return integrate_over_absmax(rule, fmt, distribution, size, deviation, ROUNDED)


@expected_noise.register
def nvfp4_noise(
    rule: NVFP4Scale,
    fmt: Format,
    distribution: Distribution,
    size: int,
    blocks: int = 1,
    deviation: float = 1.0,
) -> float:
    """Integrate over the absmax of the tensor, and over that of the blocks given it.

    One block has the absmax of the tensor. The values of the others are truncated to it.
    """
    if rule.candidates is None or len(rule.candidates) > 1:
        raise ValueError("NVFP4Scale with several candidates: use sample_noise")
    levels, noise = list_levels(fmt), 0.0
    largest, weights = place_absmax(distribution, size * blocks, TENSOR)
    for amax, weight in zip(largest, weights, strict=True):
        if weight * amax**2 < 1e-10:
            continue
        fixed = replace(rule, amax=float(deviation * amax))
        reach = np.array([amax])
        total = block_noise(
            distribution, levels, compute_scale(fixed, fmt, reach, deviation), reach, size
        )[0]
        if blocks > 1:
            absmax, inner = place_absmax(distribution, size, BLOCKS, amax)
            scale = compute_scale(fixed, fmt, absmax, deviation)
            others = inner @ block_noise(distribution, levels, scale, absmax, size)
            total += (blocks - 1) * others
        noise += weight * total / blocks
    return float(noise)


@expected_noise.register
def minmax_noise(
    rule: MinMax,
    fmt: Format,
    distribution: Distribution,
    size: int,
    blocks: int = 1,
    deviation: float = 1.0,
) -> float:
    """Integrate over the least and the largest value of a block."""
    if size < 2:
        raise ValueError("a block of a single value has no range: give a size of 2 or more")
    low, high, weights = place_extremes(distribution, size)
    pairs = torch.from_numpy(np.stack([low, high], 1) * deviation).float()
    qparams = rule(pairs, fmt)
    scale, zero = (x.double().numpy() for x in (qparams.scale, qparams.zero))
    levels = (list_levels(fmt) - zero) * scale / deviation
    inside = cell_noise(distribution, levels, low, high)
    probability = distribution.moment(0, high) - distribution.moment(0, low)
    others = inside / np.maximum(probability, 1e-300) * (size - 2)
    ends = nearest_noise(levels, low) + nearest_noise(levels, high)
    return float(weights @ (others + ends) / size)


def fixed_scale_noise(
    levels: Float[np.ndarray, "v"], scale: float, distribution: Distribution
) -> float:
    """Return the expected squared error of rounding to the nearest of fixed levels times a scale.

    Values beyond the ends are clipped. This is the quantizer of Max (1960) and Lloyd (1982).

    Example:
        >>> sixteen = np.arange(-7.5, 8)
        >>> fixed_scale_noise(sixteen, 0.3352, GeneralizedNormal(2.0))
        0.0115...
    """
    end = np.array([1e9])
    return float(cell_noise(distribution, scale * levels[None], -end, end)[0])


def integrate_over_absmax(
    rule: ScaleRule,
    fmt: Format,
    distribution: Distribution,
    size: int,
    deviation: float,
    step: float,
) -> float:
    """Return the expected squared error of a rule whose scales depend on the absmax alone."""
    absmax, weights = place_absmax(distribution, size, step)
    scale = compute_scale(rule, fmt, absmax, deviation)
    return float(weights @ block_noise(distribution, list_levels(fmt), scale, absmax, size))


def list_levels(fmt: Format) -> Float[np.ndarray, "1 v"]:
    """Return all values of a format, ascending.

    Raises:
        ValueError: if its values are not rounded one by one, as those of a shared mantissa.
    """
    if not isinstance(fmt, NumberFormat | Codebook):
        raise ValueError(f"{fmt.name} is not rounded value by value: use sample_noise")
    return fmt.values().double().numpy()[None]


def compute_scale(rule: ScaleRule, fmt: Format, absmax: Nodes, deviation: float) -> Nodes:
    """Return the scales that a rule gives to blocks of unit variance with these absmaxes."""
    blocks = torch.from_numpy(absmax * deviation).float()[:, None]
    scale = rule(blocks, fmt).scale  # pyright: ignore[reportAttributeAccessIssue]
    return scale[:, 0].double().numpy() / deviation


def place_nodes(step: float) -> tuple[Nodes, Nodes, Nodes]:
    """Return log p, log(1 - p) and weights of the nodes of the integral over p in [0, 1]."""
    y = np.arange(*RANGE, step)
    log_below, log_above = -np.logaddexp(0, -y), -np.logaddexp(0, y)
    return log_below, log_above, step * np.exp(log_below + log_above)


def place_absmax(
    distribution: Distribution, size: int, step: float, limit: float | None = None
) -> tuple[Nodes, Nodes]:
    """Return the absmax of a block at each node, and the weights of the nodes.

    Args:
        distribution: The distribution of the values.
        size: The number of values.
        step: The step between nodes.
        limit: The magnitude that the values are truncated to, if any.
    """
    log_below, _, weights = place_nodes(step)
    above = -np.expm1(log_below / size)
    if limit is not None:
        inside = 2 * float(distribution.half_moment(0, np.array([limit]))[0])
        above = (1 - inside) + inside * above
    return distribution.magnitude_quantile(np.minimum(above, 1.0)), weights


def place_extremes(distribution: Distribution, size: int) -> tuple[Nodes, Nodes, Nodes]:
    """Return the least and the largest value of a block at each node, and the weights."""
    log_below, log_above, weights = place_nodes(CORNERS)
    first, second = np.nonzero(np.outer(weights, weights) > 1e-11)
    # Of the largest value: its probabilities of being above others, and of being below them.
    under, over = np.exp(log_below / size), -np.expm1(log_below / size)
    high = distribution.quantile(under, over)[first]
    # Of the least one, given the largest: the size - 1 others are truncated to be below that.
    least = under[first] * -np.expm1(log_above[second] / (size - 1))
    low = distribution.quantile(least, 1 - least)
    return low, high, weights[first] * weights[second]


def block_noise(
    distribution: Distribution, levels: Levels, scale: Nodes, absmax: Nodes, size: int
) -> Nodes:
    """Return the mean squared error of a block with each absmax and scale."""
    scaled = levels * scale[:, None]
    inside = cell_noise(distribution, scaled, -absmax, absmax)
    probability = 2 * distribution.half_moment(0, absmax)
    others = inside / np.maximum(probability, 1e-300) * (size - 1)
    ends = (nearest_noise(scaled, absmax) + nearest_noise(scaled, -absmax)) / 2
    return (others + ends) / size


def nearest_noise(levels: Levels, x: Nodes) -> Nodes:
    """Return the squared distance of each value from the nearest level of its row."""
    return ((levels - x[:, None]) ** 2).min(1)


def cell_noise(distribution: Distribution, levels: Levels, low: Nodes, high: Nodes) -> Nodes:
    """Return the integral of the squared error times the density from low to high."""
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    inner = np.clip(np.broadcast_to(middle, (len(low), middle.shape[1])), low[:, None], None)
    bounds = np.column_stack([low, np.minimum(inner, high[:, None]), high])
    zeroth, first, second = (np.diff(distribution.moment(k, bounds), axis=1) for k in range(3))
    return (second - 2 * levels * first + levels**2 * zeroth).sum(1)
