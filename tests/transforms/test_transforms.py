"""Transforms keep x W^T, alone and in chains, and reduce the quantization error."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.special import softmax
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional as F

from fp4dit.numerics.formats import floating
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.transforms.base import Transform, TransformSpec, squared_output_error
from fp4dit.transforms.hadamard import Hadamard, RegularHadamard
from fp4dit.transforms.low_rank import LowRank, LowRankBF16, factor_low_rank
from fp4dit.transforms.refined_low_rank import QuantizedLowRank, RefinedLowRank
from fp4dit.transforms.shift import Shift
from fp4dit.transforms.smoothing import (
    MovingAverageBatchMax,
    MovingAverageMax,
    PowerOfTwoSmoothingSearch,
    SalienceWeightedMax,
    Smoothing,
    SmoothingSearch,
    smoothing_factors,
    spearman_correlation,
)

E2M1 = Quantizer(floating(2, 1), PerChannel())
SPECS = [
    Smoothing(),
    Smoothing(0.3, MovingAverageMax()),
    Smoothing(statistic=SalienceWeightedMax()),
    SmoothingSearch(4),
    SmoothingSearch(3, branch=LowRank(2)),
    Hadamard(),
    Hadamard(12, seed=1),
    Hadamard(4, signs=False),
    RegularHadamard(),
    LowRank(),
    LowRank(3, iterations=4),
    LowRank(99),
    LowRankBF16(3, iterations=2),
    PowerOfTwoSmoothingSearch(4),
    RefinedLowRank(3),
    QuantizedLowRank(3, bits=5, input_bits=None),
]
OUT, K = 20, 24
specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def weight_and_inputs(
    out: int = OUT,
    k: int = K,
    calls: int = 3,
    tokens: int = 16,
    seed: int = 0,
    outlier: float = 10.0,
) -> tuple[Tensor, Tensor]:
    """Return a weight and inputs as behind an adaLN.

    The tokens are normalized and modulated call by call, and a few channels are `outlier` times as
    large.
    """
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    gain = torch.ones(k)
    gain[torch.randperm(k, generator=draw)[: max(1, k // 50)]] = outlier
    modulated = normal(calls, tokens, k) * (1 + 0.3 * normal(calls, 1, k)) + 0.3 * normal(
        calls, 1, k
    )
    return normal(out, k) * 0.05, modulated * gain


def fit_chain(
    chain: list[TransformSpec], weight: Tensor, x: Tensor, quantizer: Quantizer = E2M1
) -> list[Transform]:
    transforms = [spec(*weight.shape) for spec in chain]
    for transform in transforms:
        transform.fit_weight(weight, quantizer)
        transform.fit(weight, x, quantizer, quantizer)
        weight, x = transform.transform_weight(weight), transform.transform_input(x)
    return transforms


def layer_output(
    chain: list[Transform], weight: Tensor, x: Tensor, quantizer: Quantizer | None = None
) -> Tensor:
    """Return the output of a layer, quantized if there is a quantizer."""
    beside = torch.zeros(())
    for transform in chain:
        added = transform.compute_bypass(x)
        beside = beside if added is None else beside + added
        weight, x = transform.transform_weight(weight), transform.transform_input(x)
    if quantizer is not None:
        weight, x = quantizer(weight), quantizer(x)
    return x @ weight.mT + beside


@settings(max_examples=60)
@given(chain=st.lists(st.sampled_from(SPECS), max_size=4), seed=st.integers(0, 99))
def test_chains_cancel(chain: list[TransformSpec], seed: int):
    weight, x = weight_and_inputs(seed=seed)
    transforms = fit_chain(chain, weight, x)
    weight, x = weight.double(), x.double()
    torch.testing.assert_close(
        layer_output(transforms, weight, x), x @ weight.mT, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("pair", product(SPECS, SPECS), ids=str)
def test_pairs_cancel(pair: tuple[TransformSpec, TransformSpec]):
    weight, x = weight_and_inputs()
    transforms = fit_chain(list(pair), weight, x)
    torch.testing.assert_close(
        layer_output(transforms, weight, x), x @ weight.mT, rtol=1e-5, atol=1e-5
    )
    assert layer_output(transforms, weight, x[0, 0]).shape == (OUT,)
    weight, x = weight.double(), x.double()
    torch.testing.assert_close(
        layer_output(transforms, weight, x), x @ weight.mT, rtol=1e-12, atol=1e-12
    )


@specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(spec: TransformSpec, dtype: torch.dtype):
    """The result is that of fp32 rounded once, also under autocast."""
    weight, x = (t.to(dtype) for t in weight_and_inputs())
    (transform,) = fit_chain([spec], weight, x)
    for f, value in (
        (transform.transform_input, x),
        (transform.transform_weight, weight),
        (transform.compute_bypass, x),
    ):
        expected = f(value.float())
        assert (expected is None) == (f(value) is None)
        if expected is not None:
            assert torch.equal(f(value), expected.to(dtype))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(f(value.float()), expected)


@specs
def test_does_nothing_or_only_rotates_until_fitted(spec: TransformSpec):
    weight, x = weight_and_inputs()
    torch.testing.assert_close(
        layer_output([spec(OUT, K)], weight, x), x @ weight.mT, rtol=1e-5, atol=1e-5
    )


@specs
def test_saved_and_loaded_it_computes_the_same(spec: TransformSpec):
    weight, x = weight_and_inputs()
    (transform,) = fit_chain([spec], weight, x)
    loaded = spec(OUT, K)
    loaded.load_state_dict(transform.state_dict())
    assert torch.equal(
        layer_output([loaded], weight, x, E2M1), layer_output([transform], weight, x, E2M1)
    )
    assert (
        loaded.storage_bits()
        == transform.storage_bits()
        == 8 * sum(v.numel() * v.element_size() for v in transform.state_dict().values())
    )


def test_bits():
    bits = [
        spec(64, 96).storage_bits()
        for spec in (Smoothing(), SmoothingSearch(), Hadamard(), LowRank(), LowRank(5))
    ]
    assert bits == [16 * 96, 16 * 96, 0, 16 * 3 * (64 + 96), 16 * 5 * (64 + 96)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_balanced_channels_follow_the_published_formula(alpha: float):
    """The channel maxima become (x w)^(1 - alpha) in the input and (x w)^alpha in the weight."""
    weight, x = weight_and_inputs()
    (transform,) = fit_chain([Smoothing(alpha)], weight, x)
    x_max, w_max = x.abs().amax((0, 1)), weight.abs().amax(0)
    close = {"rtol": 1e-3, "atol": 0}  # kept in fp16
    torch.testing.assert_close(
        transform.transform_input(x).abs().amax((0, 1)), (x_max * w_max) ** (1 - alpha), **close
    )
    torch.testing.assert_close(
        transform.transform_weight(weight).abs().amax(0), (x_max * w_max) ** alpha, **close
    )


def test_dead_channels_stay_and_extremes_are_bounded():
    weight, x = weight_and_inputs()
    weight[:, 3], x[..., 5] = 0, 0
    weight[:, 7] *= 1e12
    x[..., 8] *= 1e20
    (transform,) = fit_chain([Smoothing()], weight, x)
    s = transform.divisor.float()
    assert s[3] == s[5] == 1
    torch.testing.assert_close(s[[7, 8]], torch.tensor([1e-5, 65504.0]), rtol=2e-3, atol=0)
    assert layer_output([transform], weight, x).isfinite().all()


def test_moving_max_is_a_filter_that_starts_settled():
    weight, x = weight_and_inputs(calls=30)
    maxima = x.abs().amax(1).double().numpy()
    expected, _ = lfilter([0.2], [1, -0.8], maxima, axis=0, zi=0.8 * maxima[:1])
    torch.testing.assert_close(
        MovingAverageMax(0.8)(x, weight).double(), torch.from_numpy(expected[-1]), rtol=1e-5, atol=0
    )


def test_maxima_are_averaged_over_a_batch_before_the_moving_average():
    """The loop of ViDiT-Q's code: maxima over tokens, the mean over images, then the average."""
    weight, x = weight_and_inputs(calls=10)
    average = None
    for batch in (x[:4], x[4:8], x[8:]):
        largest = batch.abs().max(1).values.mean(0)
        average = largest if average is None else 0.8 * average + (1 - 0.8) * largest
    torch.testing.assert_close(MovingAverageBatchMax(0.8, batch=4)(x, weight), average)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_rank_correlation_is_scipys_ties_included(pairs: list[tuple[int, int]]):
    a, b = torch.tensor(pairs, dtype=torch.float32).T
    if len(a.unique()) > 1 and len(b.unique()) > 1:
        assert spearman_correlation(a, b).item() == pytest.approx(
            spearmanr(a, b).statistic, abs=1e-12
        )
    else:
        assert spearman_correlation(a, b) == 0


def test_salience_favors_calls_unlike_the_weight():
    weight, x = weight_and_inputs(calls=4)
    maxima = x.abs().amax(1).numpy()
    rho = [spearmanr(call, weight.abs().amax(0)).statistic for call in maxima]
    expected = torch.from_numpy((softmax([-r for r in rho])[:, None] * maxima).sum(0))
    torch.testing.assert_close(
        SalienceWeightedMax()(x, weight).double(), expected, rtol=1e-5, atol=0
    )


def test_salience_of_equal_calls_is_their_maximum():
    """The statistic is then that of SmoothQuant."""
    weight, x = weight_and_inputs(calls=1)
    x = x.expand(5, -1, -1)
    plain, salient = (
        fit_chain([Smoothing(0.5, of)], weight, x)[0].divisor
        for of in (Smoothing().statistic, SalienceWeightedMax())
    )
    torch.testing.assert_close(salient, plain, rtol=2**-10, atol=0)  # sums of five fifths; fp16


def test_smoothing_search_returns_the_best_candidate():
    weight, x = weight_and_inputs()
    (transform,) = fit_chain([SmoothingSearch(4)], weight, x)
    assert set(SmoothingSearch(4).candidate_exponents()) == {(0, 0)} | {
        (i / 4, b) for i in range(1, 4) for b in (0, 1 - i / 4)
    }
    assert len(SmoothingSearch(20).candidate_exponents()) == 39  # as many as in deepcompressor

    def error(s: Tensor) -> float:
        return squared_output_error(x, weight, E2M1(x / s), E2M1(weight * s))

    sizes = x.abs().amax((0, 1)), weight.abs().amax(0)
    errors = [
        error(smoothing_factors(*sizes, a, b)) for a, b in SmoothingSearch(4).candidate_exponents()
    ]
    assert error(transform.divisor) == min(errors) < 0.6 * error(torch.ones(K))
    exact = torch.randint(-4, 5, (16, 8)).float()
    exact[:, 0], exact[0] = 6, 6  # on the grid, with scales of 1: any balance only harms
    (transform,) = fit_chain([SmoothingSearch()], exact, exact.clone()[None])
    assert torch.equal(transform.divisor, torch.ones(8, dtype=torch.float16))


def test_a_search_with_a_branch_judges_what_the_branch_leaves():
    """The formula of deepcompressor's smooth.py: SVD, a quantized rest, and an exact branch."""
    weight, x = weight_and_inputs(32, 48, outlier=30.0)
    sizes = x.abs().amax((0, 1)), weight.abs().amax(0)
    errors: dict[tuple[float, float], list[float]] = {}
    for a, b in SmoothingSearch(8).candidate_exponents():
        s = smoothing_factors(*sizes, a, b).float()
        u, sigma, vh = torch.linalg.svd((weight * s).double())
        for rank in (0, 4):
            branch = (u[:, :rank] * sigma[:rank] @ vh[:rank]).float()
            output = x / s @ branch.mT + E2M1(x / s) @ E2M1(weight * s - branch).mT
            error = (output - x @ weight.mT).square().sum().item()
            errors.setdefault((a, b), []).append(error)
    without, within = (min(errors, key=lambda pair: errors[pair][i]) for i in (0, 1))
    assert without != within  # so that the test can tell them apart
    for spec, (a, b) in (
        (SmoothingSearch(8), without),
        (SmoothingSearch(8, branch=LowRank(4)), within),
    ):
        (transform,) = fit_chain([spec], weight, x)
        assert torch.equal(transform.divisor, smoothing_factors(*sizes, a, b))


def test_a_shift_makes_the_output_of_gelu_positive():
    """Deepcompressor's ShiftedLinear: x + c, and a bias of -c times the sum of each row."""
    weight, x = weight_and_inputs()
    (transform,) = fit_chain([Shift()], weight, x)
    for approximate in ("none", "tanh"):
        grid = F.gelu(torch.linspace(-8, 0, 100_001), approximate=approximate)
        assert 0 < transform.transform_input(grid).min() < 0.002
    bias = -0.171875 * weight.double().sum(1)
    expected = (x + 0.171875).double() @ weight.double().mT + bias
    torch.testing.assert_close(
        layer_output([transform], weight, x).double(), expected, rtol=0, atol=2**-11 * 0.2
    )
    torch.testing.assert_close(expected, x.double() @ weight.double().mT, rtol=1e-9, atol=1e-6)
    assert transform.storage_bits() == 16 * OUT


@pytest.mark.parametrize("shape", [(20, 24), (24, 20)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_low_rank_is_the_nearest_of_its_rank(shape: tuple[int, int], rank: int):
    """Eckart-Young: what is left are the smaller singular values."""
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up, down = factor_low_rank(weight, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    left = torch.linalg.svdvals(weight - up @ down)
    expected = torch.linalg.svdvals(weight)[rank:]
    torch.testing.assert_close(left[: 20 - rank], expected, rtol=1e-10, atol=1e-10)
    assert left[20 - rank :].abs().max() < 1e-10


@pytest.mark.parametrize("rank", [20, 99])
def test_a_branch_of_full_rank_leaves_nothing(rank: int):
    weight, x = weight_and_inputs()
    (transform,) = fit_chain([LowRank(rank)], weight, x)
    assert (
        transform.transform_weight(weight).norm() < 2**-10 * weight.norm()
    )  # what fp16 factors cannot hold
    torch.testing.assert_close(transform.compute_bypass(x), x @ weight.mT, rtol=2e-3, atol=2e-2)
    assert transform.storage_bits() == 16 * 20 * (20 + 24)


@pytest.mark.parametrize(("seed", "helpful"), [(0, 2), (3, 5)])
def test_iterating_stops_at_the_first_iteration_that_harms(seed: int, helpful: int):
    """On these inputs, it is the iteration after the `helpful` ones."""
    weight, x = weight_and_inputs(32, 64, seed=seed)

    def error(iterations: int) -> float:
        transforms = fit_chain([LowRank(4, iterations)], weight, x)
        return (layer_output(transforms, weight, x, E2M1) - x @ weight.mT).square().sum().item()

    errors = [error(n) for n in range(1, 9)]
    assert errors[:helpful] == sorted(set(errors[:helpful]), reverse=True)
    assert set(errors[helpful:]) == {errors[helpful - 1]}


@pytest.mark.parametrize("spec", [LowRank(0), LowRank(-1), LowRank(4, iterations=0)], ids=str)
def test_a_branch_of_nothing_is_an_error(spec: LowRank):
    with pytest.raises(ValueError, match=r"rank .* iterations keeps nothing: give both at least 1"):
        spec(OUT, K)


def test_small_layers_get_a_branch_too():
    assert LowRank()(OUT, 16).down.shape == (1, 16)
    assert LowRank()(1152, 1152).down.shape == (36, 1152)


@pytest.mark.parametrize("outlier", [10.0, 30.0])
def test_order_of_pre_transforms_in_w4a4(outlier: float):
    """The order of errors in E2M1 per token and output channel, behind an adaLN with outliers.

    The inputs are synthetic. The factors change with the outliers, and at 100 a rotation alone no
    longer helps.
    """
    weight, x = weight_and_inputs(256, 576, calls=8, tokens=32, outlier=outlier)
    exact = x @ weight.mT

    def error(*chain: TransformSpec) -> float:
        transforms = fit_chain(list(chain), weight, x)
        return (
            (layer_output(transforms, weight, x, E2M1) - exact).square().sum()
            / exact.square().sum()
        ).item()

    none, smooth, block, rotated = (
        error(),
        error(Smoothing()),
        error(Hadamard(32)),
        error(Hadamard()),
    )
    assert none > 2 * smooth
    assert none > 2 * block > 2.1 * rotated
    assert rotated > 1.5 * error(Smoothing(), Hadamard())
    one_shot, iterated = (error(Smoothing(), LowRank(iterations=n)) for n in (1, 10))
    assert smooth > 2 * one_shot
    assert one_shot > 1.03 * iterated


def test_power_of_two_smoothing_and_branches_in_bf16_are_moved_exactly():
    """The branch divided by the smoothing, as Nunchaku has it, is in bf16 again."""
    weight, x = weight_and_inputs(64, 128)
    division, branch = fit_chain([PowerOfTwoSmoothingSearch(8), LowRankBF16(8)], weight, x)
    factors = division.state_dict()["divisor"].double()
    assert factors.log2().round().exp2().equal(factors)
    assert factors.unique().numel() > 1
    down = branch.state_dict()["down"].double()
    assert (down / factors).bfloat16().double().equal(down / factors)
