"""Block scales, against exact integer arithmetic, torchao,
ml_dtypes and what is known of Gaussian values.
"""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import f4_unpacked_to_f32, unpack_uint4
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from fp4dit.numerics.block_scales import (
    E4M3,
    CeilRatioExponent,
    E8M0Scale,
    ExponentRule,
    NVFP4Scale,
    PowerOfTwoNVFP4Scale,
    ceil_exponent,
    even_exponent,
    floor_exponent,
    floor_ratio_exponent,
    nearest_ratio_exponent,
)
from fp4dit.numerics.formats import NumberFormat, floating, integer
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.scale_rules import (
    AbsMax,
    RootMeanSquares,
    ScaleRule,
    StandardDeviations,
    quantization_error,
    select_least_error,
)
from fp4dit.numerics.scale_search import MinError, Percentile

E2M1, E5M2 = floating(2, 1), floating(5, 2, reserved=4)
SEARCH = E8M0Scale(floor_exponent, shifts=(0, -1, 1))
EVERY_CODE, FOUR_OVER_SIX = (
    NVFP4Scale(candidates=None),
    NVFP4Scale(top=256.0, candidates=(1.0, 1.5)),
)
MANTISSA_BITS = {
    E2M1: 1,
    floating(2, 3): 3,
    floating(3, 2): 2,
    E4M3: 3,
    E5M2: 2,
    integer(8): 6,
    floating(3, 0): 0,
}


def log2(x: Fraction) -> int:
    """floor(log2 x), by counting digits."""
    guess = x.numerator.bit_length() - x.denominator.bit_length()
    return guess - (x < Fraction(2) ** guess)


def log2_up(x: Fraction) -> int:
    return log2(x) + (x != Fraction(2) ** log2(x))


def log2_near(x: Fraction) -> int:
    return (log2(x * x) + 1) // 2


def digits(x: Fraction, mantissa: int) -> Fraction:
    """Rounded to so many mantissa bits, ties to even."""
    unit = Fraction(2) ** (log2(x) - mantissa)
    return round(x / unit) * unit


RULES: dict[ExponentRule, Callable[[Fraction, Fraction, int], int]] = {
    floor_exponent: lambda x, top, m: log2(x) - log2(top),
    ceil_exponent: lambda x, top, m: log2_up(x) - log2(top),
    even_exponent: lambda x, top, m: log2(digits(x, m)) - log2(top),
    nearest_ratio_exponent: lambda x, top, m: log2_near(x / top),
    floor_ratio_exponent: lambda x, top, m: log2(x / top),
    CeilRatioExponent(): lambda x, top, m: log2_up(x / top),
    CeilRatioExponent(7.25 / 6): lambda x, top, m: log2_up(x / (top * Fraction(29, 24))),
}


CASES = [
    (rule, fmt)
    for rule in RULES
    for fmt in MANTISSA_BITS
    if fmt is E2M1 or rule != CeilRatioExponent(7.25 / 6)
]


@pytest.mark.parametrize(("rule", "fmt"), CASES)
def test_exponents_are_exact_for_every_binade(rule: ExponentRule, fmt: NumberFormat):
    shares = [
        1,
        1.5,
        1.75,
        1.25,
        1.8125,
        1 + 2**-23,
        1.5 + 2**-23,
        1.75 - 2**-23,
        1.75 + 2**-23,
        2 - 2**-23,
    ]
    reach = torch.tensor([[s * 2.0**k] for k in range(-149, 128) for s in shares])
    reach = reach[reach > 0][:, None]
    amax = [Fraction(value) for value in reach.flatten().tolist()]
    expected = [RULES[rule](x, Fraction(fmt.max), MANTISSA_BITS[fmt]) for x in amax]
    scales = E8M0Scale(rule)(reach, fmt).scale.double()
    assert scales.flatten().tolist() == [2.0 ** max(-127, min(127, e)) for e in expected]
    assert (
        E8M0Scale(rule, factor=4 / 3)(reach, fmt).scale.double().div(scales).sub(4 / 3).abs().max()
        < 1e-6
    )


def test_e8m0_scales_are_what_its_eight_bits_hold():
    x = (
        torch.randn(600, 4, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-44, 37, 600)[:, None]
    )
    scale = SEARCH(x, E2M1).scale.numpy()
    assert np.array_equal(scale.astype(ml_dtypes.float8_e8m0fnu).astype(np.float32), scale)
    assert len(np.unique(scale)) > 200


REACHES = [
    E8M0Scale(nearest_ratio_exponent, reach=reach)
    for reach in (StandardDeviations(), RootMeanSquares())
]


@pytest.mark.parametrize(
    "rule", [E8M0Scale(), SEARCH, *REACHES], ids=["even", "search", "sigmas", "squares"]
)
def test_empty_and_broken_blocks_stay_so_and_spoil_no_other(rule: E8M0Scale):
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    x[0], x[2, 3], x[3, 0], x[4, 1] = 0, float("inf"), float("-inf"), float("nan")
    scaling = rule(x, E2M1)
    assert scaling.scale[0] == 1
    assert scaling.scale.isnan().flatten().tolist() == [False, False, True, True, True, False]
    rounded = scaling.from_grid(E2M1.nearest(scaling.to_grid(x)))
    assert torch.equal(rounded[0], x[0])
    assert rounded[2:5].isnan().all()
    assert torch.equal(rule(x[[1, 5]], E2M1).scale, scaling.scale[[1, 5]])


@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        (floor_exponent, "FLOOR"),
        (ceil_exponent, "CEIL"),
        (even_exponent, "EVEN"),
        (CeilRatioExponent(), "RCEIL"),
    ],
    ids=["floor", "ceil", "even", "rceil"],
)
@pytest.mark.parametrize(
    ("fmt", "element"),
    [
        (E2M1, torch.float4_e2m1fn_x2),
        (floating(2, 3), "fp6_e2m3"),
        (floating(3, 2), "fp6_e3m2"),
        (E4M3, torch.float8_e4m3fn),
        (E5M2, torch.float8_e5m2),
    ],
    ids=["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"],
)
def test_mx_is_bit_equal_to_torchao(rule: ExponentRule, mode: str, fmt: NumberFormat, element: Any):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(512, 32, generator=g) * 2.0 ** torch.randint(-90, 90, (512, 1), generator=g)
    x[1::2] = x[1::2].bfloat16().float()  # many ties
    x[0] = 0
    scale, codes = to_mx(x, element, 32, ScaleCalculationMode[mode])
    scaling = E8M0Scale(rule)(x, fmt)
    assert torch.equal(scaling.scale[1:, 0], scale[1:, 0].float())
    rounded = scaling.from_grid(fmt.nearest(scaling.to_grid(x)))
    assert torch.equal(rounded, to_dtype(codes, scale, element, 32, torch.float32))


@pytest.mark.parametrize("amax", [2688.0, 1.0, 17.3])
def test_nvfp4_is_bit_equal_to_torchao(amax: float):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g) * torch.logspace(-7, 0, 256)[:, None]
    x = x / x.abs().max() * amax
    tensor = per_tensor_amax_to_scale(x.abs().max())
    scale, codes = nvfp4_quantize(x, 16, tensor)
    blocks = x.view(-1, 16)
    scaling = NVFP4Scale(min_scale=2**-6)(blocks, E2M1)
    total = scale.float().view(-1, 1) * tensor
    assert torch.equal(scaling.scale, total)
    theirs = f4_unpacked_to_f32(unpack_uint4(codes)).view(-1, 16) * total
    assert torch.equal(scaling.from_grid(E2M1.nearest(scaling.to_grid(blocks))), theirs)


def test_block_scales_round_as_torch_casts_to_e4m3():
    codes = E4M3.values()
    x = torch.cat(
        [
            torch.rand(9999) * 448,
            torch.logspace(-10, 8.8, 999, 2),
            codes,
            (codes[1:] + codes[:-1]) / 2,
        ]
    )
    x = x.abs().clamp(2**-9, 448)
    assert torch.equal(E4M3.nearest(x), x.to(torch.float8_e4m3fn).float())
    assert (codes > 0).sum() == 126


def test_more_candidates_never_err_more_in_any_block():
    """With one tensor scale for all, since each has the one before among its candidates."""
    x = (
        torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-4, 0, 2000)[:, None]
    )
    rules = [NVFP4Scale(top=256.0), FOUR_OVER_SIX, NVFP4Scale(top=256.0, candidates=None)]
    plain, two, every = (quantization_error(x, rule(x, E2M1), E2M1) for rule in rules)
    assert (two <= plain).all()
    assert (every <= two).all()
    assert 0.3 < (two < plain).float().mean() < 0.6  # 45 % are known for Gaussian values


def test_nvfp4_of_nothing_and_of_next_to_nothing():
    x = torch.zeros(3, 16)
    for rule in (NVFP4Scale(), EVERY_CODE, FOUR_OVER_SIX):
        assert torch.equal(E2M1.nearest(rule(x, E2M1).to_grid(x)), x)
    x[0], x[1] = 1e6, 1e-6
    scale = NVFP4Scale()(x, E2M1).scale
    tensor = x.max() / (448 * 6)
    torch.testing.assert_close(scale, torch.tensor([[448.0], [2**-9], [2**-9]]) * tensor)
    tiny = torch.full((1, 16), 1e-44)  # amax / 2688 is 0 in fp32
    assert (
        NVFP4Scale()(tiny, E2M1)
        .from_grid(E2M1.nearest(NVFP4Scale()(tiny, E2M1).to_grid(tiny)))
        .isfinite()
        .all()
    )


def test_a_known_amax_makes_parts_agree_with_the_whole():
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    known = NVFP4Scale(amax=x.abs().max().item())
    assert torch.equal(
        torch.cat([known(x[:9], E2M1).scale, known(x[9:], E2M1).scale]), NVFP4Scale()(x, E2M1).scale
    )


@pytest.mark.parametrize(
    "base",
    [
        NVFP4Scale(),
        FOUR_OVER_SIX,
        Percentile(NVFP4Scale(), 0.9),
        E8M0Scale(),
        E8M0Scale(floor_exponent),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_search_stays_on_the_grid_of_scales(base: ScaleRule):
    x = (
        torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-2, 0, 500)[:, None]
    )
    best, plain = MinError(base, lowest=0.6, highest=1.8, candidates=25)(x, E2M1), base(x, E2M1)
    before, after = quantization_error(x, plain, E2M1), quantization_error(x, best, E2M1)
    assert (after <= before).all()
    assert after.sum() < before.sum() * 0.999
    if isinstance(base, E8M0Scale):
        assert (torch.frexp(best.scale).mantissa == 0.5).all()
        return
    clipped = base.clip_outliers(x) if isinstance(base, Percentile) else x
    top = base.top if isinstance(base, NVFP4Scale) else 448
    codes = best.scale / (clipped.abs().max() / (top * 6))
    torch.testing.assert_close(E4M3.nearest(codes), codes, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "rule",
    [SEARCH, FOUR_OVER_SIX, EVERY_CODE, E8M0Scale(even_exponent, shifts=(0, -1, 1), p=1.0)],
    ids=lambda rule: type(rule).__name__,
)
def test_searches_are_the_best_of_their_candidates_as_weighed(rule: E8M0Scale | NVFP4Scale):
    """Compare each block's error with that of every scale that the rule may take."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(1, 16, generator=torch.Generator().manual_seed(1)) ** 8

    def least(weights: Tensor | None) -> Tensor:
        return quantization_error(x, rule(x, E2M1, weights), E2M1, rule.p, importance)[:, 0]

    if isinstance(rule, E8M0Scale):
        start = E8M0Scale(rule.round)(x, E2M1).scale
        tried = [start * 2.0**shift for shift in rule.shifts]
    else:
        tensor, ideal = x.abs().max() / (rule.top * 6), x.abs().amax(1, keepdim=True) / 6
        every = [torch.full((200, 1), code) for code in E4M3.values().tolist() if code > 0]
        codes = (
            every if rule.candidates is None else [(ideal / tensor * r) for r in rule.candidates]
        )
        tried = [code.to(torch.float8_e4m3fn).float() * tensor for code in codes]
    errors = torch.stack(
        [quantization_error(x, Scale(scale), E2M1, rule.p, importance)[:, 0] for scale in tried]
    )
    torch.testing.assert_close(least(importance), errors.amin(0))
    assert (least(importance) < least(None) * 0.999).any()


def test_of_equal_candidates_the_first_is_taken():
    x = torch.zeros(2, 4)
    assert torch.equal(
        select_least_error(x, E2M1, [Scale(torch.full((2, 1), v)) for v in (3.0, 1.0)]).scale,
        torch.full((2, 1), 3.0),
    )


def noise(rule: ScaleRule, width: int, octave: bool = True) -> float:
    """Return the relative squared error for Gaussians, averaged over an octave of deviations."""
    x = torch.randn(2**17 // width, width, generator=torch.Generator().manual_seed(0))
    sigmas = [2 ** (i / 8) for i in range(8)] if octave else [1.0]
    errors = [
        quantization_error(x * s, rule(x * s, E2M1), E2M1).sum() / (x * s).square().sum()
        for s in sigmas
    ]
    return torch.stack(errors).mean().item()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (E8M0Scale(floor_exponent), 0.01337),
        (E8M0Scale(ceil_exponent), 0.0199),
        (E8M0Scale(CeilRatioExponent()), 0.01365),
        (E8M0Scale(even_exponent), 0.0126),
        (E8M0Scale(CeilRatioExponent(7.25 / 6)), 0.0125),
        (E8M0Scale(floor_exponent, factor=4 / 3), 0.0136),
        (SEARCH, 0.0125),
        (E8M0Scale(nearest_ratio_exponent, reach=StandardDeviations()), 0.0134),
        (AbsMax(), 0.0102),
    ],
    ids=["floor", "ceil", "rceil", "even", "c725", "tseng", "search", "sigmas", "fp32"],
)
def test_known_errors_of_powers_of_two(rule: ScaleRule, expected: float):
    assert noise(rule, 32) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (NVFP4Scale(), 0.00906),
        (FOUR_OVER_SIX, 0.00758),
        (NVFP4Scale(top=256.0, candidates=(1.5,)), 0.00966),
        (EVERY_CODE, 0.0066),
    ],
    ids=["plain", "4/6", "always 4", "every code"],
)
def test_known_errors_of_nvfp4(rule: ScaleRule, expected: float):
    assert noise(rule, 16, octave=False) == pytest.approx(expected, rel=0.03)


def test_the_cost_of_block_scales():
    assert E8M0Scale().storage_bits(E2M1, 10) == 80
    assert MinError(NVFP4Scale()).storage_bits(E2M1, 10) == 80 + 32


@pytest.mark.parametrize("amax", [2688.0, 2688.5, 1.0, 17.3, 1e-6])
def test_a_power_of_two_of_the_tensor_clips_nothing(amax: float):
    blocks = torch.full((4, 16), amax)
    blocks[1:] *= torch.rand(3, 16)
    rule, fmt = PowerOfTwoNVFP4Scale(), floating(2, 1)
    power = math.ldexp(1.0, math.ceil(math.log2(amax / 2688)))
    assert rule.tensor_scale(blocks, fmt).item() == power
    scale = rule(blocks, fmt).scale
    assert (scale / power <= 448).all()
    assert (scale / power).to(torch.float8_e4m3fn).float().equal(scale / power)
    assert scale.bfloat16().float().equal(scale)
