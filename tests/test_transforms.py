"""Pre-transforms: x W^T stays, alone and in chains; what they are fitted to; what they are for."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.special import softmax
from scipy.stats import spearmanr
from torch import Tensor

from fp4dit.formats import floating
from fp4dit.hadamard import Hadamard
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.transforms import (
    Balance,
    BalanceSearch,
    LowRank,
    MovingMax,
    Salience,
    Transform,
    TransformSpec,
    divisors,
    low_rank,
    output_error,
    spearman,
)

E2M1 = Quantizer(floating(2, 1), Granularity("row"))
SPECS = [
    Balance(),
    Balance(0.3, MovingMax()),
    Balance(of=Salience()),
    BalanceSearch(4),
    Hadamard(),
    Hadamard(12, seed=1),
    Hadamard(4, signs=False),
    LowRank(),
    LowRank(3, iterations=4),
    LowRank(99),
]
OUT, K = 20, 24
specs = pytest.mark.parametrize("spec", SPECS, ids=str)


def weight_and_inputs(
    out: int = OUT, k: int = K, calls: int = 3, tokens: int = 16, seed: int = 0, outlier: float = 10.0
) -> tuple[Tensor, Tensor]:
    """A layer behind an adaLN: normalised tokens, modulated call by call, a few channels `outlier` times as large."""
    draw = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    gain = torch.ones(k)
    gain[torch.randperm(k, generator=draw)[: max(1, k // 50)]] = outlier
    modulated = normal(calls, tokens, k) * (1 + 0.3 * normal(calls, 1, k)) + 0.3 * normal(calls, 1, k)
    return normal(out, k) * 0.05, modulated * gain


def fitted(chain: list[TransformSpec], weight: Tensor, x: Tensor, quantizer: Quantizer = E2M1) -> list[Transform]:
    made = [spec(*weight.shape) for spec in chain]
    for transform in made:
        transform.fit(weight, x, quantizer, quantizer)
        weight, x = transform.weight(weight), transform.activation(x)
    return made


def output(chain: list[Transform], weight: Tensor, x: Tensor, quantizer: Quantizer | None = None) -> Tensor:
    """What a layer makes of x; nothing is quantized without a quantizer."""
    beside = torch.zeros(())
    for transform in chain:
        added = transform.bypass(x)
        beside = beside if added is None else beside + added
        weight, x = transform.weight(weight), transform.activation(x)
    if quantizer is not None:
        weight, x = quantizer(weight), quantizer(x)
    return x @ weight.mT + beside


@settings(max_examples=60)
@given(chain=st.lists(st.sampled_from(SPECS), max_size=4), seed=st.integers(0, 99))
def test_chains_cancel(chain: list[TransformSpec], seed: int):
    weight, x = weight_and_inputs(seed=seed)
    made = fitted(chain, weight, x)
    weight, x = weight.double(), x.double()
    torch.testing.assert_close(output(made, weight, x), x @ weight.mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pair", product(SPECS, SPECS), ids=str)
def test_pairs_cancel(pair: tuple[TransformSpec, TransformSpec]):
    weight, x = weight_and_inputs()
    made = fitted(list(pair), weight, x)
    torch.testing.assert_close(output(made, weight, x), x @ weight.mT, rtol=1e-5, atol=1e-5)
    assert output(made, weight, x[0, 0]).shape == (OUT,)
    weight, x = weight.double(), x.double()
    torch.testing.assert_close(output(made, weight, x), x @ weight.mT, rtol=1e-12, atol=1e-12)


@specs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(spec: TransformSpec, dtype: torch.dtype):
    """As the transform of the same values in fp32, rounded once: also under autocast."""
    weight, x = (t.to(dtype) for t in weight_and_inputs())
    (made,) = fitted([spec], weight, x)
    for f, value in ((made.activation, x), (made.weight, weight), (made.bypass, x)):
        expected = f(value.float())
        assert (expected is None) == (f(value) is None)
        if expected is not None:
            assert torch.equal(f(value), expected.to(dtype))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(f(value.float()), expected)


@specs
def test_does_nothing_or_only_rotates_until_fitted(spec: TransformSpec):
    weight, x = weight_and_inputs()
    torch.testing.assert_close(output([spec(OUT, K)], weight, x), x @ weight.mT, rtol=1e-5, atol=1e-5)


@specs
def test_saved_and_loaded_it_computes_the_same(spec: TransformSpec):
    weight, x = weight_and_inputs()
    (made,) = fitted([spec], weight, x)
    loaded = spec(OUT, K)
    loaded.load_state_dict(made.state_dict())
    assert torch.equal(output([loaded], weight, x, E2M1), output([made], weight, x, E2M1))
    assert loaded.bits() == made.bits() == 8 * sum(v.numel() * v.element_size() for v in made.state_dict().values())


def test_bits():
    found = [spec(64, 96).bits() for spec in (Balance(), BalanceSearch(), Hadamard(), LowRank(), LowRank(5))]
    assert found == [16 * 96, 16 * 96, 0, 16 * 3 * (64 + 96), 16 * 5 * (64 + 96)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_balanced_channels_follow_the_published_formula(alpha: float):
    """Each channel's maximum becomes x^(1 - alpha) w^(1 - alpha) in the input, x^alpha w^alpha in the weight."""
    weight, x = weight_and_inputs()
    (made,) = fitted([Balance(alpha)], weight, x)
    x_max, w_max = x.abs().amax((0, 1)), weight.abs().amax(0)
    close = {"rtol": 1e-3, "atol": 0}  # kept in fp16
    torch.testing.assert_close(made.activation(x).abs().amax((0, 1)), (x_max * w_max) ** (1 - alpha), **close)
    torch.testing.assert_close(made.weight(weight).abs().amax(0), (x_max * w_max) ** alpha, **close)


def test_dead_channels_stay_and_extremes_are_bounded():
    weight, x = weight_and_inputs()
    weight[:, 3], x[..., 5] = 0, 0
    weight[:, 7] *= 1e12
    x[..., 8] *= 1e20
    (made,) = fitted([Balance()], weight, x)
    s = made.divisor.float()
    assert s[3] == s[5] == 1
    torch.testing.assert_close(s[[7, 8]], torch.tensor([1e-5, 65504.0]), rtol=2e-3, atol=0)
    assert output([made], weight, x).isfinite().all()


def test_moving_max_is_a_filter_that_starts_settled():
    weight, x = weight_and_inputs(calls=30)
    maxima = x.abs().amax(1).double().numpy()
    expected, _ = lfilter([0.2], [1, -0.8], maxima, axis=0, zi=0.8 * maxima[:1])
    torch.testing.assert_close(MovingMax(0.8)(x, weight).double(), torch.from_numpy(expected[-1]), rtol=1e-5, atol=0)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=40))
def test_rank_correlation_is_scipys_ties_included(pairs: list[tuple[int, int]]):
    a, b = torch.tensor(pairs, dtype=torch.float32).T
    if len(a.unique()) > 1 and len(b.unique()) > 1:
        assert spearman(a, b).item() == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)
    else:
        assert spearman(a, b) == 0


def test_salience_favours_calls_whose_large_channels_are_not_the_weights():
    weight, x = weight_and_inputs(calls=4)
    maxima = x.abs().amax(1).numpy()
    rho = [spearmanr(call, weight.abs().amax(0)).statistic for call in maxima]
    expected = torch.from_numpy((softmax([-r for r in rho])[:, None] * maxima).sum(0))
    torch.testing.assert_close(Salience()(x, weight).double(), expected, rtol=1e-5, atol=0)


def test_salience_of_equal_calls_is_their_maximum():
    """Then it is SmoothQuant's statistic (methods.md, 8.2)."""
    weight, x = weight_and_inputs(calls=1)
    x = x.expand(5, -1, -1)
    plain, salient = (fitted([Balance(0.5, of)], weight, x)[0].divisor for of in (Balance().of, Salience()))
    torch.testing.assert_close(salient, plain, rtol=2**-10, atol=0)  # sums of five fifths; fp16


def test_search_takes_the_best_of_its_grid_and_no_balance_if_nothing_helps():
    weight, x = weight_and_inputs()
    (made,) = fitted([BalanceSearch(4)], weight, x)
    assert set(BalanceSearch(4).powers()) == {(0, 0)} | {(i / 4, b) for i in range(1, 5) for b in (0, 1 - i / 4)}

    def error(s: Tensor) -> float:
        return output_error(x, weight, E2M1(x / s), E2M1(weight * s))

    sizes = x.abs().amax((0, 1)), weight.abs().amax(0)
    errors = [error(divisors(*sizes, a, b)) for a, b in BalanceSearch(4).powers()]
    assert error(made.divisor) == min(errors) < 0.6 * error(torch.ones(K))
    exact = torch.randint(-4, 5, (16, 8)).float()
    exact[:, 0], exact[0] = 6, 6  # on the grid, with scales of 1: any balance only harms
    (made,) = fitted([BalanceSearch()], exact, exact.clone()[None])
    assert torch.equal(made.divisor, torch.ones(8, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(20, 24), (24, 20)])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_low_rank_is_the_nearest_of_its_rank(shape: tuple[int, int], rank: int):
    """Eckart-Young: what is left are the smaller singular values."""
    weight = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up, down = low_rank(weight, rank)
    assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
    left = torch.linalg.svdvals(weight - up @ down)
    expected = torch.linalg.svdvals(weight)[rank:]
    torch.testing.assert_close(left[: 20 - rank], expected, rtol=1e-10, atol=1e-10)
    assert left[20 - rank :].abs().max() < 1e-10


@pytest.mark.parametrize("rank", [20, 99])
def test_a_branch_of_full_rank_leaves_nothing(rank: int):
    weight, x = weight_and_inputs()
    (made,) = fitted([LowRank(rank)], weight, x)
    assert made.weight(weight).norm() < 2**-10 * weight.norm()  # what fp16 factors cannot hold
    torch.testing.assert_close(made.bypass(x), x @ weight.mT, rtol=2e-3, atol=2e-2)
    assert made.bits() == 16 * 20 * (20 + 24)


@pytest.mark.parametrize(("seed", "helpful"), [(0, 2), (3, 5)])
def test_iterating_stops_at_the_first_iteration_that_harms(seed: int, helpful: int):
    """Which is the one after the `helpful` ones, on these inputs."""
    weight, x = weight_and_inputs(32, 64, seed=seed)

    def error(iterations: int) -> float:
        made = fitted([LowRank(4, iterations)], weight, x)
        return (output(made, weight, x, E2M1) - x @ weight.mT).square().sum().item()

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
    """E2M1, a scale per token and per output channel, behind an adaLN with outlier channels (methods.md, 7.11).

    On synthetic inputs: the factors change with the outliers, and at 100 a rotation alone no longer helps.
    """
    weight, x = weight_and_inputs(256, 576, calls=8, tokens=32, outlier=outlier)
    exact = x @ weight.mT

    def error(*chain: TransformSpec) -> float:
        made = fitted(list(chain), weight, x)
        return ((output(made, weight, x, E2M1) - exact).square().sum() / exact.square().sum()).item()

    none, smooth, block, rotated = error(), error(Balance()), error(Hadamard(32)), error(Hadamard())
    assert none > 2 * smooth
    assert none > 2 * block > 2.1 * rotated
    assert rotated > 1.5 * error(Balance(), Hadamard())
    one_shot, iterated = (error(Balance(), LowRank(iterations=n)) for n in (1, 10))
    assert smooth > 2 * one_shot
    assert one_shot > 1.03 * iterated
