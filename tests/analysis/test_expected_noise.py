"""Integrated errors against closed forms, published values, quadrature and Monte Carlo."""

import math

import numpy as np
import pytest
from scipy import stats

from fp4dit.analysis import (
    Distribution,
    GeneralizedNormal,
    StudentT,
    Uniform,
    expected_noise,
    fixed_scale_noise,
    sample_noise,
    to_decibels,
)
from fp4dit.analysis.weight_formats import BLOCK_FORMATS
from fp4dit.numerics import (
    AbsMax,
    E8M0Scale,
    Format,
    MinError,
    MinMax,
    NVFP4Scale,
    PerGroup,
    PerTensor,
    Quantizer,
    ScaleRule,
    floor_exponent,
    parse_format,
)

NORMAL = GeneralizedNormal(2.0)


def fmt(name: str) -> Format:
    parsed = parse_format(name)
    assert isinstance(parsed, Format)
    return parsed


# --- Fixed levels ---------------------------------------------------------------------------------


def test_a_uniform_quantizer_of_a_uniform_distribution_leaves_a_twelfth_of_the_squared_step():
    step = 2 * math.sqrt(3) / 16
    levels = np.arange(-7.5, 8)
    assert fixed_scale_noise(levels, step, Uniform()) == pytest.approx(step**2 / 12, rel=1e-12)


@pytest.mark.parametrize(
    ("count", "step", "noise"), [(4, 0.9957, 0.1188), (8, 0.5860, 0.03744), (16, 0.3352, 0.01154)]
)
def test_the_best_uniform_quantizers_of_a_normal_distribution_are_those_of_max(
    count: int, step: float, noise: float
):
    """J. Max, Quantizing for minimum distortion, 1960, table II."""
    levels = np.arange(count) - (count - 1) / 2
    assert fixed_scale_noise(levels, step, NORMAL) == pytest.approx(noise, rel=1e-3)
    for worse in (0.97, 1.03):
        assert fixed_scale_noise(levels, worse * step, NORMAL) > noise


def test_lloyds_quantizer_of_sixteen_levels_leaves_the_known_minimum():
    """0.009497 (Max 1960, table I); no format of 16 levels is better with a fixed scale."""
    levels = np.linspace(-2.5, 2.5, 16)
    for _ in range(2000):
        edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
        levels = -np.diff(stats.norm.pdf(edges)) / np.diff(stats.norm.cdf(edges))
    assert fixed_scale_noise(levels, 1.0, NORMAL) == pytest.approx(0.009497, rel=1e-3)
    nf4 = fmt("nf4").values().double().numpy()
    assert min(fixed_scale_noise(nf4, s, NORMAL) for s in np.linspace(2, 3, 30)) > 0.009497


def test_the_best_range_of_e2m1_is_about_that_of_quest():
    """Quartet (arXiv:2505.14669, section 4) has 2.92247856; plain quadrature gives the error."""
    levels, reach = fmt("e2m1").values().double().numpy(), 2.92247856
    errors = [fixed_scale_noise(levels, c / 6, NORMAL) for c in (2.8, reach, 3.05)]
    assert errors[1] == min(errors)
    x = (np.arange(400_000) + 0.5) / 40_000  # half of the line, up to 10
    rounded = reach / 6 * np.abs(levels)[np.abs(x[:, None] * 6 / reach - levels).argmin(1)]
    plain = 2 * float(np.sum((x - rounded) ** 2 * stats.norm.pdf(x))) / 40_000
    assert errors[1] == pytest.approx(plain, rel=1e-6)


# --- Scales of blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 16, 1000])
def test_symmetric_integers_of_a_uniform_distribution_have_a_closed_form(size: int):
    """Given the absmax a, the other values are uniform on 14 whole steps of a / 7."""
    expected = (size - 1) / (size + 2) * 3 / (12 * 7**2)
    assert expected_noise(AbsMax(), fmt("int4"), Uniform(), size) == pytest.approx(
        expected, rel=1e-6, abs=1e-15
    )


def test_pairs_of_a_normal_distribution_agree_with_plain_quadrature():
    """E2M1 with the absmax x of a pair, and y below it: a sum over a grid of the plane."""
    levels = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = (np.arange(1000) + 0.5) / 150
    x, y = np.meshgrid(grid, grid)
    edges = (levels[1:] + levels[:-1]) / 2
    rounded = x / 6 * levels[np.searchsorted(edges, 6 * y / x)]
    density = 8 * stats.norm.pdf(x) * stats.norm.pdf(y) / 150**2
    plain = np.sum((y - rounded) ** 2 * density * (y < x)) / 2
    ours = expected_noise(AbsMax(), fmt("e2m1"), NORMAL, 2)
    assert ours == pytest.approx(plain, rel=2e-3)


def test_mx_with_floor_and_four_thirds_has_the_published_error():
    """Quartet's table 2: 1.37e-2 for rounding to nearest with the absmax, on normal values."""
    rule = E8M0Scale(round=floor_exponent, factor=4 / 3)
    octave = [2 ** (i / 8) for i in range(8)]
    noise = [expected_noise(rule, fmt("e2m1"), NORMAL, 32, deviation=s) for s in octave]
    assert np.mean(noise) == pytest.approx(1.37e-2, abs=5e-5)


@pytest.mark.parametrize("rule", [AbsMax(), NVFP4Scale()], ids=["absmax", "nvfp4"])
def test_scales_that_are_no_powers_of_two_do_not_see_the_deviation(rule: ScaleRule):
    small, large = (
        expected_noise(rule, fmt("e2m1"), NORMAL, 16, 4, deviation=s) for s in (0.01, 3.0)
    )
    assert small == pytest.approx(large, rel=1e-4)


# --- Monte Carlo ----------------------------------------------------------------------------------

SYMMETRIC = [("int4", AbsMax()), ("e2m1", AbsMax()), ("e3m0", AbsMax()), ("nf4", AbsMax())]
RULES: list[tuple[str, ScaleRule]] = [
    *SYMMETRIC,
    ("e1m2", AbsMax(fmt("fp16"))),  # pyright: ignore[reportArgumentType]
    ("uint4", MinMax()),
    ("e2m1", E8M0Scale()),
    ("int4", NVFP4Scale()),
]
DISTRIBUTIONS = [NORMAL, GeneralizedNormal(0.8), StudentT(6.0), Uniform()]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize(("name", "rule"), RULES, ids=lambda value: str(value)[:12])
def test_integration_agrees_with_monte_carlo(
    name: str, rule: ScaleRule, distribution: Distribution
):
    for size in (16,) if isinstance(rule, NVFP4Scale) else (16, 128):
        quantizer = Quantizer(fmt(name), PerGroup(size), rule)
        sampled = sample_noise(quantizer, distribution, (64, 256), tensors=40)
        exact = expected_noise(rule, fmt(name), distribution, size, blocks=64 * 256 // size)
        assert abs(sampled.mean - exact) < 4 * sampled.error
        assert sampled.error < 0.015 * exact


@pytest.mark.parametrize(("name", "rule"), [*SYMMETRIC, ("uint4", MinMax())])
def test_integration_agrees_with_monte_carlo_for_a_tensor(name: str, rule: ScaleRule):
    sampled = sample_noise(Quantizer(fmt(name), PerTensor(), rule), NORMAL, (64, 256), 60)
    exact = expected_noise(rule, fmt(name), NORMAL, 64 * 256)
    assert abs(sampled.mean - exact) < 4 * sampled.error


def test_if4_is_better_than_each_of_its_formats():
    sampled = {
        name: sample_noise(BLOCK_FORMATS[name], NORMAL, (64, 256), 20).mean
        for name in ("nvfp4", "nvint4", "if4")
    }
    assert to_decibels(sampled["if4"]) > 0.3 + max(
        to_decibels(sampled["nvfp4"]), to_decibels(sampled["nvint4"])
    )


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        (MinError(AbsMax()), "e2m1"),
        (NVFP4Scale(candidates=(1.0, 1.5)), "e2m1"),
        (E8M0Scale(shifts=(0, 1)), "e2m1"),
        (AbsMax(), "e2m2_share4"),
    ],
)
def test_what_cannot_be_integrated_is_refused(rule: ScaleRule, name: str):
    with pytest.raises(ValueError, match="use sample_noise"):
        expected_noise(rule, fmt(name), NORMAL, 16)
