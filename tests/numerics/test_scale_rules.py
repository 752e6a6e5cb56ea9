"""Scale rules: what they promise of every block, against brute force where it is cheap."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.qparams import (
    Affine,
    Offset,
    QParams,
    Scale,
    TwoSided,
    as_tensors,
    from_tensors,
)
from fp4dit.numerics.scale_rules import (
    AbsMax,
    MinMax,
    OffsetRange,
    ScaleRule,
    StandardDeviations,
    TwoSidedAbsMax,
    quantization_error,
    round_scale,
)
from fp4dit.numerics.scale_search import (
    BestOf,
    MinError,
    PartScales,
    Percentile,
    PreShift,
    Quantile,
)

SYMMETRIC = [floating(2, 1), floating(3, 0), floating(3, 4), integer(4), integer(8)]
UNSIGNED = [integer(4, signed=False), integer(8, signed=False)]


def blocks(seed: int = 0, rows: int = 64, width: int = 32) -> Tensor:
    """Return blocks of every size: some lopsided, others all positive, all negative or zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-4, 3, rows)[:, None]
    x[::3] += x[::3].abs().amax(1, keepdim=True) * 0.4
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
    return x


def rounded(x: Tensor, scaling: QParams, fmt: NumberFormat) -> Tensor:
    return scaling.from_grid(fmt.nearest(scaling.to_grid(x)))


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda f: f.name)
def test_absmax_clips_nothing_and_wastes_nothing(fmt: NumberFormat):
    x = blocks()
    grid = AbsMax()(x, fmt).to_grid(x).abs().amax(1)
    assert (grid <= fmt.max * (1 + 1e-6)).all()
    assert (grid[1:] >= fmt.max * (1 - 1e-6)).all()
    largest = x.abs().amax(1)
    torch.testing.assert_close(
        rounded(x, AbsMax()(x, fmt), fmt).abs().amax(1), largest, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("fmt", UNSIGNED, ids=lambda f: f.name)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_minmax_keeps_zero_exact_and_errs_by_half_a_step(fmt: NumberFormat, seed: int):
    x = blocks(seed, rows=8)
    x[:, 0] = 0
    scaling = MinMax()(x, fmt)
    assert (rounded(x, scaling, fmt)[:, 0] == 0).all()
    assert (scaling.zero == scaling.zero.round()).all()
    assert ((rounded(x, scaling, fmt) - x).abs() <= scaling.scale * 0.5001).all()


def test_minmax_agrees_with_torch_fake_quantize():
    fmt, x = integer(8, signed=False), blocks(rows=40)[3:]
    scaling = MinMax()(x, fmt)
    for row, scale, zero, mine in zip(
        x, scaling.scale, scaling.zero, rounded(x, scaling, fmt), strict=True
    ):
        theirs = torch.fake_quantize_per_tensor_affine(row, scale.item(), int(zero), 0, 255)
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5, atol=scale.item() * 1.001
        )  # a tie may fall elsewhere
        assert ((mine - theirs).abs() < scale / 2).float().mean() > 0.99


@pytest.mark.parametrize("rule", [AbsMax, MinMax])
def test_stored_scales_are_representable(rule: type):
    scaling = rule(fp16)(blocks(), integer(4, signed=False))
    assert torch.equal(scaling.scale, scaling.scale.half().float())
    assert (scaling.scale > 0).all()


def test_a_stored_scale_never_becomes_zero():
    tiny = torch.tensor([[0.0], [1e-12], [1e-30]])
    assert torch.equal(round_scale(tiny, fp16), torch.full((3, 1), 2.0**-24))
    assert (round_scale(tiny, None) > 0).all()


@pytest.mark.parametrize("store", [None, fp16])
@pytest.mark.parametrize(
    "rule",
    [
        AbsMax,
        MinMax,
        lambda s: MinError(AbsMax(s)),
        lambda s: MinError(MinMax(s)),
        lambda s: Percentile(AbsMax(s), keep=0.5),
        lambda s: BestOf([Percentile(MinMax(s), keep) for keep in (0.5, 0.8, 1.0)]),
        OffsetRange,
    ],
)
@pytest.mark.parametrize("fmt", [floating(2, 1), integer(4, signed=False)], ids=lambda f: f.name)
def test_a_block_of_zeros_stays_one(rule: type, store: NumberFormat | None, fmt: NumberFormat):
    x = torch.zeros(2, 8)
    assert torch.equal(rounded(x, rule(store)(x, fmt), fmt), x)


@pytest.mark.parametrize(
    ("fmt", "base"), [(floating(2, 1), AbsMax()), (integer(4), AbsMax()), (UNSIGNED[0], MinMax())]
)
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_min_error_is_the_best_of_all_clippings_block_by_block(
    fmt: NumberFormat, base: ScaleRule, p: float
):
    x = blocks(rows=12)
    rule = MinError(base, p=p, lowest=0.4, candidates=25)
    least = torch.full((len(x), 1), float("inf"))
    for ratio in torch.linspace(1, 0.4, 25):
        for i, row in enumerate(x):  # each block alone, so that nothing leaks between blocks
            clipped = row.clamp(row.min() * ratio, row.max() * ratio)[None]
            least[i] = torch.minimum(
                least[i], quantization_error(row[None], base(clipped, fmt), fmt, p)[0]
            )
    error = quantization_error(x, rule(x, fmt), fmt, p)
    torch.testing.assert_close(error, least)
    assert (error <= quantization_error(x, base(x, fmt), fmt, p)).all()
    assert (error < quantization_error(x, base(x, fmt), fmt, p) * 0.99).any()


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_min_error_weighs_by_importance_and_stretches(p: float):
    """Against every scale tried by hand, with the weighted error written out."""
    fmt, x = floating(3, 0), blocks()[3:]
    importance = torch.rand(1, 32, generator=torch.Generator().manual_seed(1)) ** 8
    rule = MinError(AbsMax(), p=p, lowest=0.5, highest=1.5, candidates=11)

    def by_hand(scale: Tensor) -> Tensor:
        return (((fmt.nearest(x / scale) * scale - x).abs() ** p) * importance).sum(1)

    absmax = x.abs().amax(1, keepdim=True) / fmt.max
    tried = torch.stack(
        [by_hand(absmax * ratio) for ratio in [1.0, *torch.linspace(0.5, 1.5, 11).tolist()]]
    )
    chosen = rule(x, fmt, importance).scale
    torch.testing.assert_close(by_hand(chosen), tried.amin(0), rtol=1e-4, atol=0)
    assert (chosen > absmax * 1.05).any()
    assert (by_hand(chosen) < by_hand(rule(x, fmt).scale) * 0.99).any()


def test_an_unimportant_outlier_is_clipped():
    x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 30.0
    importance = torch.ones(1, 32)
    importance[0, 5] = 0
    rule = MinError(AbsMax(), lowest=0.02, candidates=99)
    assert rule(x, floating(2, 1), importance).scale < rule(x, floating(2, 1)).scale / 2


def test_two_sided_scales_are_absmax_for_each_sign():
    """Equal scales reduce to the same values."""
    fmt, x = floating(2, 1), blocks()
    both = rounded(x, TwoSidedAbsMax()(x, fmt), fmt)
    for sign in (1, -1):
        side = (sign * x).clamp(min=0)
        assert torch.equal((sign * both).clamp(min=0), rounded(side, AbsMax()(side, fmt), fmt))
    same = AbsMax()(x, fmt).scale
    assert torch.equal(rounded(x, TwoSided(same, same), fmt), rounded(x, Scale(same), fmt))


@pytest.mark.parametrize(
    ("width", "one", "two"), [(16, 0.00886, 0.00707), (32, 0.0102, 0.0089), (128, 0.0118, 0.0112)]
)
def test_two_sided_scales_gain_what_is_known_for_gaussian_values(
    width: int, one: float, two: float
):
    fmt, x = (
        floating(2, 1),
        torch.randn(2**18 // width, width, generator=torch.Generator().manual_seed(0)),
    )
    for rule, expected in [(AbsMax(), one), (TwoSidedAbsMax(), two)]:
        noise = (rounded(x, rule(x, fmt), fmt) - x).square().mean() / x.square().mean()
        assert noise.item() == pytest.approx(expected, rel=0.03)


def test_two_sided_needs_two_sides():
    with pytest.raises(
        ValueError, match="uint4 has no negative values to scale: use MinMax or OffsetRange"
    ):
        TwoSidedAbsMax()(blocks(), integer(4, signed=False))


def clip_at(count: float, x: Tensor, fmt: NumberFormat) -> Scale:
    return Scale(StandardDeviations(count)(x) / fmt.max)


def test_standard_deviations_clip_gaussian_values_best():
    """The least error that is known for Gaussian values in E2M1."""
    fmt, x = floating(2, 1), torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)) + 0.0
    noise = quantization_error(x, clip_at(2.92247856, x, fmt), fmt).mean() / 4096
    assert noise.item() == pytest.approx(0.01268, rel=0.02)
    for kappa in (2.5, 3.4):
        assert quantization_error(x, clip_at(kappa, x, fmt), fmt).mean() / 4096 > noise * 1.03


@pytest.mark.parametrize(
    "value", [3.0, -1.152360200881958]
)  # rounding makes 16 of the latter deviate
def test_a_constant_block_is_not_clipped_by_its_deviation(value: float):
    x = torch.full((1, 16), value)
    torch.testing.assert_close(
        rounded(x, clip_at(2.92247856, x, floating(2, 1)), floating(2, 1)), x
    )


@pytest.mark.parametrize("fmt", [*UNSIGNED, floating(2, 1)], ids=lambda f: f.name)
@settings(max_examples=15)
@given(seed=st.integers(0, 1000))
def test_offset_range_fills_the_format_exactly(fmt: NumberFormat, seed: int):
    x = blocks(seed)[3:] + 2.0
    grid = OffsetRange()(x, fmt).to_grid(x)
    size = x.abs().amax(1) / (x.amax(1) - x.amin(1)) * (fmt.max - fmt.min) * 1e-6
    assert ((grid.amin(1) - fmt.min).abs() <= size).all()
    assert ((grid.amax(1) - fmt.max).abs() <= size).all()


def test_offset_range_is_finer_than_minmax_where_zero_is_far():
    x = torch.rand(8, 256, generator=torch.Generator().manual_seed(0)) + 10
    fmt = integer(4, signed=False)
    far, near = MinMax()(x, fmt), OffsetRange()(x, fmt)
    assert (rounded(x, near, fmt) - x).abs().max() * 9 < (rounded(x, far, fmt) - x).abs().max()


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.998, 1.0])
@pytest.mark.parametrize("width", [5, 32, 1000, 2000])
def test_percentile_clips_the_order_statistics_that_numpy_finds(keep: float, width: int):
    x = blocks(rows=6, width=width)
    cut = int(width * (1 - Fraction(str(keep))) / 2)
    low, high = np.sort(x.numpy(), axis=1)[:, [cut, width - 1 - cut]].T[..., None]
    expected = AbsMax()(torch.from_numpy(np.clip(x.numpy(), low, high)), integer(8)).scale
    assert torch.equal(Percentile(AbsMax(), keep)(x, integer(8)).scale, expected)


@pytest.mark.parametrize("keep", [0.998, 0.9998, 0.5, 1.0])
@pytest.mark.parametrize("width", [1, 5, 256, 1152])
def test_quantile_clips_where_numpy_does(keep: float, width: int):
    """PTQ4DiT's code clips a row between its quantiles 1 - q and q, linearly interpolated."""
    x = blocks(rows=6, width=width)
    q = (1 + keep) / 2
    low, high = torch.from_numpy(np.quantile(x.numpy(), [1 - q, q], axis=1))[..., None]
    expected = x.double().clamp(low, high).float()
    torch.testing.assert_close(Quantile(AbsMax(), keep).clip_outliers(x), expected)


def test_percentile_takes_more_values_than_torch_quantile_does():
    x = torch.arange(2**24 + 5, dtype=torch.float32).flip(0)[None]
    assert Percentile(AbsMax(), 0.5)(x, integer(8)).scale.item() == pytest.approx(
        0.75 * 2**24 / 127, rel=1e-6
    )


@pytest.mark.parametrize("keep", [0.0, 1.5])
def test_percentile_keeps_a_share(keep: float):
    with pytest.raises(ValueError, match="a share of the values above 0 and up to 1"):
        Percentile(AbsMax(), keep)


def test_part_scales_are_those_of_two_quantizers():
    """Q-Diffusion's code splits a concatenation and quantizes either part with its own range."""
    x = channels()
    fmt = integer(8, signed=False)
    qparams = PartScales(MinMax())(x, fmt)
    halves = []
    for half in x.chunk(2, 1):
        flat = half.reshape(1, -1)
        halves.append(rounded(flat, MinMax()(flat, fmt), fmt).view_as(half))
    expected = torch.cat(halves, 1)
    assert torch.equal(rounded(x, qparams, fmt), expected)
    with pytest.raises(ValueError, match="does not split into 5 equal parts"):
        PartScales(MinMax(), parts=5)(x, fmt)


def channels(seed: int = 0) -> Tensor:
    """Tokens with channels of very different size, as behind adaLN; one channel is always 0."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 48, generator=g) * torch.logspace(-2, 1, 48)
    x[:, 7] = 0
    return x


@pytest.mark.parametrize("p", [1.0, 2.4])
def test_best_of_takes_the_least_error_of_each_block(p: float):
    rules, fmt = [Percentile(AbsMax(), keep) for keep in (0.9, 0.99, 1.0)], integer(4)
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(0)) ** 3
    errors = torch.stack(
        [(rounded(x, rule(x, fmt), fmt) - x).abs().pow(p).sum(1) for rule in rules]
    )
    best = (rounded(x, BestOf(rules, p)(x, fmt), fmt) - x).abs().pow(p).sum(1)
    torch.testing.assert_close(best, errors.amin(0))
    assert len(errors.argmin(0).unique()) > 1


@pytest.mark.parametrize(("exponent", "mantissa"), [(2, 1), (1, 2), (3, 0)])
def test_shifts_follow_the_formula_of_the_paper(exponent: int, mantissa: int):
    """In fp64 from the real-valued biases of arXiv:2310.16836."""
    fmt, x, span = floating(exponent, mantissa), channels(), 2**exponent - 1
    with np.errstate(divide="ignore"):
        bias = (
            2**exponent
            - np.log2(x.double().abs().amax(0).numpy())
            + np.log2(2 - 2.0**-mantissa)
            - 1
        )
    shift = np.clip(np.round(bias) - np.round(bias.min()), 0, span)
    assert set(shift) == set(range(span + 1))
    scale = PreShift(span)(x, fmt).scale
    assert torch.equal(
        scale, AbsMax()(x.view(1, -1), fmt).scale * torch.from_numpy(2.0**-shift).float()
    )
    assert torch.equal(scale, PreShift()(x, fmt).scale)


def test_a_shift_of_the_bias_is_a_shift_of_the_channel():
    """fq(x_j; rho + k_j) = 2^-k_j fq(2^k_j x_j; rho), bit by bit."""
    fmt, x = floating(2, 1), channels()
    scaling, whole = PreShift(3)(x, fmt), AbsMax()(x.view(1, -1), fmt).scale
    power = whole / scaling.scale
    assert set(power.flatten().tolist()) == {1.0, 2.0, 4.0, 8.0}
    assert torch.equal(rounded(x, scaling, fmt), rounded(x * power, Scale(whole), fmt) / power)


def test_pre_shift_helps_uneven_channels_only():
    fmt, x = floating(2, 1), torch.randn(200, 48, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 10  # the usual outlier
    plain = rounded(x, Scale(AbsMax()(x.view(1, -1), fmt).scale), fmt)
    shifted = rounded(x, PreShift(3)(x, fmt), fmt)
    quiet = torch.arange(48) != 7
    assert (shifted - x)[:, quiet].square().sum() * 10 < (plain - x)[:, quiet].square().sum()
    assert torch.equal(rounded(x, PreShift(0)(x, fmt), fmt), plain)


def test_pre_shift_shifts_from_where_its_rule_clips():
    x, importance = channels(), torch.ones(1, 48)
    rule = MinError(AbsMax(), lowest=0.3)
    whole = rule(x.view(1, -1), floating(2, 1), importance.expand_as(x).reshape(1, -1)).scale
    scale = PreShift(3, rule)(x, floating(2, 1), importance).scale
    assert scale.max() == whole < AbsMax()(x.view(1, -1), floating(2, 1)).scale
    with pytest.raises(ValueError, match="use a symmetric rule"):
        PreShift(3, MinMax())(x, integer(4, signed=False))


def test_the_cost_of_scales():
    fmt = integer(4, signed=False)
    assert AbsMax().storage_bits(fmt, 3) == 32 * 3
    assert AbsMax(fp16).storage_bits(fmt, 3) == 16 * 3
    assert (
        MinMax(fp16).storage_bits(fmt, 3)
        == MinError(Percentile(MinMax(fp16))).storage_bits(fmt, 3)
        == (16 + 4) * 3
    )
    assert (
        TwoSidedAbsMax(fp16).storage_bits(fmt, 3)
        == OffsetRange(fp16).storage_bits(fmt, 3)
        == 2 * 16 * 3
    )
    assert PreShift(3).storage_bits(fmt, 3) == 32


SCALINGS = [
    Scale(torch.rand(3, 1) + 0.1),
    Scale(torch.rand(1, 8) + 0.1),
    Affine(torch.rand(3, 1) + 0.1, torch.ones(3, 1)),
    Offset(torch.rand(3, 1) + 0.1, torch.rand(3, 1)),
    TwoSided(torch.rand(3, 1) + 0.1, torch.rand(3, 1) + 0.1),
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_scalings_are_invertible_and_survive_storage(scaling: QParams):
    x = torch.randn(3, 8)
    again = from_tensors(as_tensors(scaling))
    assert type(again) is type(scaling)
    torch.testing.assert_close(again.from_grid(scaling.to_grid(x)), x)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_unit_is_the_slope_of_the_way_back(scaling: QParams):
    grid = torch.tensor([-6.0, -4, -1, -0.5, 0, 0.5, 3, 6]).repeat(3, 1)
    slope = (scaling.from_grid(grid + 0.25) - scaling.from_grid(grid)) / 0.25
    torch.testing.assert_close(scaling.unit(grid).expand_as(grid), slope)
