"""GPTQ: column by column against dense least squares, and what must hold on any grid."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fp4dit.ams import SharedMantissa
from fp4dit.blockscales import E8M0, NVFP4
from fp4dit.calls import Call
from fp4dit.choice import Choice, LeastError
from fp4dit.errors import UserError
from fp4dit.examples import Examples
from fp4dit.formats import Format, floating, fp16, integer, nf4
from fp4dit.gptq import Order, as_given, gptq, largest_first
from fp4dit.layer import QuantLayer, wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.scaling import Scale, Scaling
from fp4dit.stream import Unit
from fp4dit.tasks.reconstruct import Rounded
from fp4dit.tasks.second_order import SecondOrder, second_moments
from tests import tiny

GROUP = Granularity("group", 16)
E2M1 = floating(2, 1)
GRIDS = {
    "tensor": Quantizer(E2M1, Granularity("tensor"), AbsMax(fp16)),
    "row": Quantizer(floating(3, 0), Granularity("row"), AbsMax(fp16)),
    "part": Quantizer(E2M1, Granularity("part", parts=2), AbsMax()),
    "group": Quantizer(E2M1, GROUP, AbsMax(fp16)),
    "integer": Quantizer(integer(4), GROUP, AbsMax(fp16)),
    "affine": Quantizer(integer(4, signed=False), GROUP, MinMax(fp16)),
    "offset": Quantizer(floating(2, 2, signed=False), GROUP, OffsetRange(fp16)),
    "codebook": Quantizer(nf4, GROUP, AbsMax(fp16)),
    "two-sided": Quantizer(E2M1, GROUP, TwoSidedAbsMax(fp16)),
    "mx": Quantizer(E2M1, Granularity("group", 32), E8M0()),
    "nvfp4": Quantizer(E2M1, GROUP, NVFP4()),
}
grids = pytest.mark.parametrize("quantizer", GRIDS.values(), ids=GRIDS.keys())
orders = pytest.mark.parametrize("order", [as_given, largest_first], ids=lambda f: f.__name__)


def problem(seed: int = 0, o: int = 8, k: int = 64, n: int = 256) -> tuple[Tensor, Tensor]:
    """A weight, and inputs whose channels are correlated and of different size, in fp64."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(k, k, generator=g) * torch.logspace(0, -2, k)[:, None] * (torch.rand(k, generator=g) + 0.2)
    x = torch.randn(n, k, generator=g) @ mixing
    return torch.randn(o, k, generator=g) * 0.05, x.double()


def output_error(hard: Tensor, weight: Tensor, x: Tensor) -> float:
    wanted = x @ weight.double().T
    return ((x @ hard.double().T - wanted).square().sum() / wanted.square().sum()).item()


@grids
def test_uncorrelated_inputs_make_it_nearest(quantizer: Quantizer):
    w, _ = problem()
    scaling = quantizer.scaling(w)
    nearest = quantizer(w, scaling)
    energy = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(gptq(w, torch.eye(64), scaling, quantizer.format), nearest)
    assert torch.equal(gptq(w, energy.diag(), scaling, quantizer.format, block=10), nearest)
    assert torch.equal(gptq(w, energy.diag(), scaling, quantizer.format, order=largest_first), nearest)


@settings(max_examples=15)
@given(name=st.sampled_from(list(GRIDS)), seed=st.integers(0, 999), size=st.sampled_from([1e-4, 1.0, 30.0]))
def test_the_result_lies_on_the_grid_and_errs_less(name: str, seed: int, size: float):
    quantizer, (w, x) = GRIDS[name], problem(seed)
    w = w * size
    scaling = quantizer.scaling(w)
    hard = gptq(w, (x.T @ x).float(), scaling, quantizer.format, order=largest_first)
    blocks = quantizer.granularity.split(hard)
    points = scaling.from_grid(quantizer.format.values().expand(len(blocks), -1))
    assert all(torch.isin(block, allowed).all() for block, allowed in zip(blocks, points, strict=True))
    assert torch.equal(quantizer(hard, scaling), hard)  # so that freezing changes nothing
    assert output_error(hard, w, x) < output_error(quantizer(w, scaling), w, x)


def test_a_format_of_its_own_for_each_block():
    w, x = problem()
    w[:, :16] = w[:, :16].sign() * 2.0 ** (w[:, :16] * 20).round()  # blocks that want E3M0
    choice = Choice([integer(4), floating(3, 0)], LeastError(), per="block")
    blocks = GROUP.split(w)
    index = choice.choose(blocks, AbsMax())
    assert len(index.unique()) == 2
    fmt = choice.pick(index)
    scaling = AbsMax()(blocks, fmt)
    hard = gptq(w, x.T @ x, scaling, fmt)
    nearest = scaling.from_grid(fmt.nearest(scaling.to_grid(blocks))).view_as(w)
    for i, row, allowed in zip(index.flatten().tolist(), GROUP.split(hard), scaling.scale, strict=True):
        assert torch.isin(row, choice.formats[i].values() * allowed).all()
    assert output_error(hard, w, x) < output_error(nearest, w, x)
    assert torch.equal(gptq(w, torch.eye(64), scaling, fmt), nearest)


def test_a_scale_for_each_channel():
    w, x = problem()
    scaling = Scale(w.abs().amax(0, keepdim=True) / 6)
    hard = gptq(w, x.T @ x, scaling, E2M1, order=largest_first)
    assert torch.isin((hard / scaling.scale), E2M1.values()).all()
    assert output_error(hard, w, x) < output_error(scaling.from_grid(E2M1.nearest(scaling.to_grid(w))), w, x)


def by_least_squares(w: Tensor, x: Tensor, scaling: Scaling, fmt: Format, order: Tensor) -> Tensor:
    """Round a column; let those that follow, in full precision, make up for it as well as they can; and so on."""
    hard, left = w.clone(), order.tolist()
    while left:
        fixed = [j for j in range(w.shape[1]) if j not in left]
        residual = x @ w.T - x[:, fixed] @ hard[:, fixed].T
        best = torch.linalg.lstsq(x[:, left], residual).solution[0]
        hard[:, left[0]] = scaling.from_grid(fmt.nearest(scaling.to_grid(best[:, None])))[:, 0]
        left = left[1:]
    return hard


@orders
@pytest.mark.parametrize("fmt", [integer(2), integer(3), E2M1], ids=lambda f: f.name)
def test_each_column_is_the_rounded_least_squares_answer_to_those_before(fmt: Format, order: Order):
    for seed in range(5):
        w, x = problem(seed, o=7, k=6, n=20)
        w, scaling, hessian = w.double(), AbsMax()(w, fmt), x.T @ x
        expected = by_least_squares(w, x, scaling, fmt, order(hessian))
        for block in (1, 4, 128):
            assert torch.equal(gptq(w, hessian, scaling, fmt, block, damping=0.0, order=order), expected)
        assert not torch.equal(expected, scaling.from_grid(fmt.nearest(scaling.to_grid(w))))


def test_it_lies_between_nearest_and_the_best_of_all():
    """All 7^5 weights tried."""
    fmt, errors = integer(3), []
    every = torch.cartesian_prod(*[fmt.values()] * 5)
    for seed in range(20):
        w, x = problem(seed, o=1, k=5, n=20)
        scaling = AbsMax()(w, fmt)
        found = gptq(w, x.T @ x, scaling, fmt, damping=0.0)
        wanted = w.double() @ x.T
        best = ((every * scaling.scale).double() @ x.T - wanted).square().sum(1).min() / wanted.square().sum()
        nearest = Quantizer(fmt, Granularity("row"))(w, scaling)
        errors.append((best.item(), output_error(found, w, x), output_error(nearest, w, x)))
        assert best <= errors[-1][1] * (1 + 1e-9)
    best, found, nearest = torch.tensor(errors).mean(0).tolist()
    assert found - best < 0.5 * (nearest - best)


@pytest.mark.parametrize("group", [16, 128])
def test_it_cuts_the_error_of_correlated_inputs_to_a_third_and_order_helps(group: int):
    errors = []
    quantizer = Quantizer(E2M1, Granularity("group", group))
    for seed in range(4):
        w, x = problem(seed, o=32, k=128, n=1024)
        scaling, hessian = quantizer.scaling(w), (x.T @ x).float()
        hard = [gptq(w, hessian, scaling, E2M1, order=order) for order in (as_given, largest_first)]
        errors.append([output_error(one, w, x) for one in (quantizer(w, scaling), *hard)])
    nearest, plain, ordered = torch.tensor(errors).mean(0).tolist()
    assert plain < nearest / 3
    assert ordered < plain


@orders
def test_dead_channels_are_rounded_to_nearest_and_change_nothing_else(order: Order):
    w, x = problem()
    x[:, 5::7] = 0
    live = [j for j in range(64) if j % 7 != 5]
    scaling = AbsMax()(w, E2M1)
    hard = gptq(w, x.T @ x, scaling, E2M1, order=order)
    assert torch.equal(hard[:, 5::7], scaling.from_grid(E2M1.nearest(scaling.to_grid(w[:, 5::7]))))
    alone = x[:, live]
    assert torch.equal(hard[:, live], gptq(w[:, live], alone.T @ alone, scaling, E2M1, order=order))
    nearest = scaling.from_grid(E2M1.nearest(scaling.to_grid(w)))
    assert torch.equal(gptq(w, torch.zeros(64, 64), scaling, E2M1, damping=0.0), nearest)


def test_neither_the_size_of_the_inputs_nor_the_block_changes_a_bit():
    w, x = problem()
    scaling = AbsMax()(w, E2M1)
    expected = gptq(w, x.T @ x, scaling, E2M1)
    for size, block in ((2.0**-30, 128), (2.0**20, 7), (1.0, 64), (1.0, 1)):
        assert torch.equal(gptq(w, x.T @ x * size, scaling, E2M1, block), expected)


def test_a_singular_moment_is_damped_until_it_serves():
    w, _ = problem()
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)).double() + 1  # one token: rank 1
    scaling = AbsMax()(w, E2M1)
    nearest = output_error(scaling.from_grid(E2M1.nearest(scaling.to_grid(w))), w, x)
    for dtype in (torch.float32, torch.float64):
        hard = gptq(w, (x.T @ x).to(dtype), scaling, E2M1, damping=0.0)
        assert output_error(hard, w, x) < 0.1 * nearest


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_moment_that_is_not_finite_is_an_error(bad: float):
    w, x = problem()
    hessian = x.T @ x
    hessian[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        gptq(w, hessian, AbsMax()(w, E2M1), E2M1)


def test_a_matrix_that_is_no_second_moment_is_an_error():
    w, _ = problem(k=2)
    with pytest.raises(ValueError, match="no sum of x x"):
        gptq(w, torch.tensor([[1.0, 5.0], [5.0, 1.0]]), AbsMax()(w, E2M1), E2M1)


class Pair(nn.Module):
    """Two layers that read one tensor, one that reads the first's answer, a convolution, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = (nn.Linear(32, 32) for _ in range(3))
        self.conv, self.idle = nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.k(x), self.out(self.q(x).tanh()), self.conv(x[:, None])


def unit() -> tuple[Pair, list[QuantLayer], Examples]:
    original, g = Pair().requires_grad_(False), torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, 8, generator=g) @ torch.randn(8, 32, generator=g)
    module, layers = Pair().requires_grad_(False), []
    for name in ("q", "k", "out", "conv", "idle"):
        quantizer = Quantizer(E2M1, Granularity("group", 16), AbsMax(fp16))
        layers.append(wrap(module.get_submodule(name), quantizer).prepare())
        module.set_submodule(name, layers[-1])
    target = dict(zip("abc", original(x), strict=True))
    return (
        module,
        layers,
        Examples(Unit("", ("x",), lambda s: Call((s["x"],), {}), tuple("abc")), {"x": x}, target, torch.arange(30)),
    )


def test_moments_are_sums_over_the_trained_rows():
    module, layers, examples = unit()
    q, k, out, conv, idle = second_moments(module, layers, examples, batch=7)
    assert idle is None
    x = examples.inputs["x"][:30].double()
    hidden = (x @ layers[0].rows.double().T + layers[0].bias.double()).tanh()
    patches = nn.functional.unfold(x[:, None], 4, stride=2, padding=1).mT
    for moment, tokens in ((q, x), (k, x), (out, hidden), (conv, patches)):
        flat = tokens.flatten(0, 1)
        torch.testing.assert_close(moment.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)


def test_fit_beats_nearest_on_held_out_rows_and_leaves_hard_weights():
    errors = {}
    for fit in (Rounded(), SecondOrder(), SecondOrder(order=largest_first, block=8, batch=9)):
        module, layers, examples = unit()
        idle = layers[-1].grid(layers[-1].rows)
        assert fit(module, layers, examples, tiny.trainer()) == []
        answers = zip(module(examples.inputs["x"][30:]), examples.targets.values(), strict=True)
        errors[fit] = [((a - t[30:]).square().sum() / t[30:].square().sum()).item() for a, t in answers]
        assert torch.equal(layers[-1].rows, idle)
        for layer in layers:
            before = layer.rows.clone()
            layer.freeze()
            assert torch.equal(layer.rows, before)
    nearest, plain, ordered = errors.values()
    for better in (plain, ordered):
        assert better[0] < 0.5 * nearest[0]
        assert better[1] < nearest[1]


def test_values_that_share_a_bit_are_refused_before_any_work():
    layer = QuantLayer(nn.Linear(8, 4), Quantizer(SharedMantissa(floating(2, 2), 4, "short"), Granularity("row")))
    with pytest.raises(UserError, match="e2m2_share4 shares a bit between 4: choose rounding=nearest"):
        SecondOrder().check([layer])
