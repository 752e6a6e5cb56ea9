"""Test GPTQ against dense least squares, and its properties on all grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.models.blocks import Unit
from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import Format, floating, fp16, integer, nf4
from fp4dit.numerics.qparams import QParams, Scale
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerSplit, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.quantization.layers import QuantLayer, make_quant_layer
from fp4dit.rounding.gptq import GPTQ, compute_hessians
from fp4dit.rounding.gptq_columns import (
    ColumnOrder,
    activation_order,
    natural_order,
    quantize_with_gptq,
    quantize_with_rescaled_groups,
)
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.helpers import tiny

GROUP = PerGroup(16)
E2M1 = floating(2, 1)
GRIDS = {
    "tensor": Quantizer(E2M1, PerTensor(), AbsMax(fp16)),
    "row": Quantizer(floating(3, 0), PerChannel(), AbsMax(fp16)),
    "part": Quantizer(E2M1, PerSplit(2), AbsMax()),
    "group": Quantizer(E2M1, GROUP, AbsMax(fp16)),
    "integer": Quantizer(integer(4), GROUP, AbsMax(fp16)),
    "affine": Quantizer(integer(4, signed=False), GROUP, MinMax(fp16)),
    "offset": Quantizer(floating(2, 2, signed=False), GROUP, OffsetRange(fp16)),
    "codebook": Quantizer(nf4, GROUP, AbsMax(fp16)),
    "two-sided": Quantizer(E2M1, GROUP, TwoSidedAbsMax(fp16)),
    "mx": Quantizer(E2M1, PerGroup(32), E8M0Scale()),
    "nvfp4": Quantizer(E2M1, GROUP, NVFP4Scale()),
}
grids = pytest.mark.parametrize("quantizer", GRIDS.values(), ids=GRIDS.keys())
orders = pytest.mark.parametrize(
    "order", [natural_order, activation_order], ids=lambda f: f.__name__
)


def make_problem(seed: int = 0, o: int = 8, k: int = 64, n: int = 256) -> tuple[Tensor, Tensor]:
    """Return a weight, and inputs in fp64 with correlated channels of different size."""
    g = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(k, k, generator=g)
        * torch.logspace(0, -2, k)[:, None]
        * (torch.rand(k, generator=g) + 0.2)
    )
    x = torch.randn(n, k, generator=g) @ mixing
    return torch.randn(o, k, generator=g) * 0.05, x.double()


def output_error(hard: Tensor, weight: Tensor, x: Tensor) -> float:
    target = x @ weight.double().T
    return ((x @ hard.double().T - target).square().sum() / target.square().sum()).item()


def round_as_q_dit(
    weight: Tensor, hessian: Tensor, group: int, damping: float, quantizer: Quantizer
) -> Tensor:
    """Return what the loop of GPTQ and Q-DiT does, with the inverse of H and scales on the way."""
    w, hessian = weight.double().clone(), hessian.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    hard = torch.zeros_like(w)
    for j in range(w.shape[1]):
        if j % group == 0:
            qparams = quantizer.compute_qparams(w[:, j : j + group].float())
        column = w[:, j : j + 1].float()
        hard[:, j : j + 1] = qparams.from_grid(quantizer.format.nearest(qparams.to_grid(column)))
        error = (w[:, j] - hard[:, j]) / inverse[j, j]
        w[:, j:] -= error[:, None] * inverse[j, j:]
    return hard.float()


@pytest.mark.parametrize("name", ["group", "affine", "two-sided", "row"])
def test_rescaled_groups_are_those_of_the_original_loop(name: str):
    quantizer, (w, x) = GRIDS[name], make_problem()
    hessian = (x.T @ x).float()
    size = quantizer.granularity.width(w[:1].shape)
    hard, qparams = quantize_with_rescaled_groups(w, hessian, quantizer, 0.01)
    torch.testing.assert_close(hard, round_as_q_dit(w, hessian, size, 0.01, quantizer))
    assert torch.equal(quantizer(hard, qparams), hard)
    fixed = quantize_with_gptq(w, hessian, quantizer.compute_qparams(w), quantizer.format)
    assert torch.equal(hard, fixed) == (size == w.shape[1])


@grids
def test_uncorrelated_inputs_are_rounded_to_nearest(quantizer: Quantizer):
    w, _ = make_problem()
    qparams = quantizer.compute_qparams(w)
    nearest = quantizer(w, qparams)
    energy = torch.rand(w.shape[1], generator=torch.Generator().manual_seed(1)) + 0.1
    assert torch.equal(quantize_with_gptq(w, torch.eye(64), qparams, quantizer.format), nearest)
    assert torch.equal(
        quantize_with_gptq(w, energy.diag(), qparams, quantizer.format, block_size=10), nearest
    )
    assert torch.equal(
        quantize_with_gptq(w, energy.diag(), qparams, quantizer.format, order=activation_order),
        nearest,
    )


@settings(max_examples=15)
@given(
    name=st.sampled_from(list(GRIDS)),
    seed=st.integers(0, 999),
    size=st.sampled_from([1e-4, 1.0, 30.0]),
)
def test_the_result_is_on_the_grid_with_less_error(name: str, seed: int, size: float):
    quantizer, (w, x) = GRIDS[name], make_problem(seed)
    w = w * size
    qparams = quantizer.compute_qparams(w)
    hard = quantize_with_gptq(
        w, (x.T @ x).float(), qparams, quantizer.format, order=activation_order
    )
    blocks = quantizer.granularity.split(hard)
    points = qparams.from_grid(quantizer.format.values().expand(len(blocks), -1))
    assert all(
        torch.isin(block, allowed).all() for block, allowed in zip(blocks, points, strict=True)
    )
    assert torch.equal(quantizer(hard, qparams), hard)  # so that `commit_weight` changes nothing
    assert output_error(hard, w, x) < output_error(quantizer(w, qparams), w, x)


def test_formats_selected_per_block():
    w, x = make_problem()
    w[:, :16] = w[:, :16].sign() * 2.0 ** (w[:, :16] * 20).round()  # blocks with less error in E3M0
    selection = FormatSelection([integer(4), floating(3, 0)], LeastError(), per="block")
    blocks = GROUP.split(w)
    index = selection.select_formats(blocks, AbsMax())
    assert len(index.unique()) == 2
    fmt = selection.format_at(index)
    qparams = AbsMax()(blocks, fmt)
    hard = quantize_with_gptq(w, x.T @ x, qparams, fmt)
    nearest = qparams.from_grid(fmt.nearest(qparams.to_grid(blocks))).view_as(w)
    for i, row, allowed in zip(
        index.flatten().tolist(), GROUP.split(hard), qparams.scale, strict=True
    ):
        assert torch.isin(row, selection.formats[i].values() * allowed).all()
    assert output_error(hard, w, x) < output_error(nearest, w, x)
    assert torch.equal(quantize_with_gptq(w, torch.eye(64), qparams, fmt), nearest)


def test_scales_per_input_channel():
    w, x = make_problem()
    qparams = Scale(w.abs().amax(0, keepdim=True) / 6)
    hard = quantize_with_gptq(w, x.T @ x, qparams, E2M1, order=activation_order)
    assert torch.isin((hard / qparams.scale), E2M1.values()).all()
    assert output_error(hard, w, x) < output_error(
        qparams.from_grid(E2M1.nearest(qparams.to_grid(w))), w, x
    )


def round_by_least_squares(
    w: Tensor, x: Tensor, qparams: QParams, fmt: Format, order: Tensor
) -> Tensor:
    """Round the columns one by one, with a least-squares solution for the remaining ones."""
    hard, remaining = w.clone(), order.tolist()
    while remaining:
        fixed = [j for j in range(w.shape[1]) if j not in remaining]
        residual = x @ w.T - x[:, fixed] @ hard[:, fixed].T
        best = torch.linalg.lstsq(x[:, remaining], residual).solution[0]
        rounded = qparams.from_grid(fmt.nearest(qparams.to_grid(best[:, None])))
        hard[:, remaining[0]] = rounded[:, 0]
        remaining = remaining[1:]
    return hard


@orders
@pytest.mark.parametrize("fmt", [integer(2), integer(3), E2M1], ids=lambda f: f.name)
def test_columns_are_rounded_least_squares_solutions(fmt: Format, order: ColumnOrder):
    for seed in range(5):
        w, x = make_problem(seed, o=7, k=6, n=20)
        w, qparams, hessian = w.double(), AbsMax()(w, fmt), x.T @ x
        expected = round_by_least_squares(w, x, qparams, fmt, order(hessian))
        for block in (1, 4, 128):
            assert torch.equal(
                quantize_with_gptq(w, hessian, qparams, fmt, block, damping=0.0, order=order),
                expected,
            )
        assert not torch.equal(expected, qparams.from_grid(fmt.nearest(qparams.to_grid(w))))


def test_the_error_lies_between_nearest_and_the_optimum():
    """The optimum is found among all 7^5 weights."""
    fmt, errors = integer(3), []
    all_weights = torch.cartesian_prod(*[fmt.values()] * 5)
    for seed in range(20):
        w, x = make_problem(seed, o=1, k=5, n=20)
        qparams = AbsMax()(w, fmt)
        hard = quantize_with_gptq(w, x.T @ x, qparams, fmt, damping=0.0)
        target = w.double() @ x.T
        all_errors = ((all_weights * qparams.scale).double() @ x.T - target).square().sum(1)
        best = all_errors.min() / target.square().sum()
        nearest = Quantizer(fmt, PerChannel())(w, qparams)
        errors.append((best.item(), output_error(hard, w, x), output_error(nearest, w, x)))
        assert best <= errors[-1][1] * (1 + 1e-9)
    best, gptq_error, nearest = torch.tensor(errors).mean(0).tolist()
    assert gptq_error - best < 0.5 * (nearest - best)


@pytest.mark.parametrize("group", [16, 128])
def test_error_of_correlated_inputs_falls_to_a_third(group: int):
    errors = []
    quantizer = Quantizer(E2M1, PerGroup(group))
    for seed in range(4):
        w, x = make_problem(seed, o=32, k=128, n=1024)
        qparams, hessian = quantizer.compute_qparams(w), (x.T @ x).float()
        hard = [
            quantize_with_gptq(w, hessian, qparams, E2M1, order=order)
            for order in (natural_order, activation_order)
        ]
        errors.append([output_error(weight, w, x) for weight in (quantizer(w, qparams), *hard)])
    nearest, plain, ordered = torch.tensor(errors).mean(0).tolist()
    assert plain < nearest / 3
    assert ordered < plain


@orders
def test_dead_channels_are_rounded_to_nearest(order: ColumnOrder):
    w, x = make_problem()
    x[:, 5::7] = 0
    live = [j for j in range(64) if j % 7 != 5]
    qparams = AbsMax()(w, E2M1)
    hard = quantize_with_gptq(w, x.T @ x, qparams, E2M1, order=order)
    assert torch.equal(hard[:, 5::7], qparams.from_grid(E2M1.nearest(qparams.to_grid(w[:, 5::7]))))
    alone = x[:, live]
    assert torch.equal(
        hard[:, live], quantize_with_gptq(w[:, live], alone.T @ alone, qparams, E2M1, order=order)
    )
    nearest = qparams.from_grid(E2M1.nearest(qparams.to_grid(w)))
    assert torch.equal(
        quantize_with_gptq(w, torch.zeros(64, 64), qparams, E2M1, damping=0.0), nearest
    )


def test_input_size_and_block_size_change_no_bit():
    w, x = make_problem()
    qparams = AbsMax()(w, E2M1)
    expected = quantize_with_gptq(w, x.T @ x, qparams, E2M1)
    for size, block in ((2.0**-30, 128), (2.0**20, 7), (1.0, 64), (1.0, 1)):
        assert torch.equal(quantize_with_gptq(w, x.T @ x * size, qparams, E2M1, block), expected)


def test_a_singular_hessian_is_damped():
    w, _ = make_problem()
    # One token has a Hessian of rank 1.
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(3)).double() + 1
    qparams = AbsMax()(w, E2M1)
    nearest = output_error(qparams.from_grid(E2M1.nearest(qparams.to_grid(w))), w, x)
    for dtype in (torch.float32, torch.float64):
        hard = quantize_with_gptq(w, (x.T @ x).to(dtype), qparams, E2M1, damping=0.0)
        assert output_error(hard, w, x) < 0.1 * nearest


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_hessian_is_an_error(bad: float):
    w, x = make_problem()
    hessian = x.T @ x
    hessian[3, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_with_gptq(w, hessian, AbsMax()(w, E2M1), E2M1)


def test_an_indefinite_hessian_is_an_error():
    w, _ = make_problem(k=2)
    with pytest.raises(ValueError, match="no sum of x x"):
        quantize_with_gptq(w, torch.tensor([[1.0, 5.0], [5.0, 1.0]]), AbsMax()(w, E2M1), E2M1)


class Pair(nn.Module):
    """Two layers with one input, a layer after the first, a convolution and an unused layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = (nn.Linear(32, 32) for _ in range(3))
        self.conv, self.idle = nn.Conv2d(1, 4, 4, stride=2, padding=1), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.k(x), self.out(self.q(x).tanh()), self.conv(x[:, None])


def make_unit() -> tuple[Pair, list[QuantLayer], UnitDataset]:
    original, g = Pair().requires_grad_(False), torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, 8, generator=g) @ torch.randn(8, 32, generator=g)
    module, layers = Pair().requires_grad_(False), []
    for name in ("q", "k", "out", "conv", "idle"):
        quantizer = Quantizer(E2M1, PerGroup(16), AbsMax(fp16))
        layers.append(make_quant_layer(module.get_submodule(name), quantizer).prepare())
        module.set_submodule(name, layers[-1])
    target = dict(zip("abc", original(x), strict=True))
    unit = Unit("", ("x",), lambda state: Call((state["x"],), {}), tuple("abc"))
    return module, layers, UnitDataset(unit, {"x": x}, target, torch.arange(30))


def test_hessians_are_sums_over_the_training_rows():
    module, layers, dataset = make_unit()
    q, k, out, conv, idle = compute_hessians(module, layers, dataset, batch_size=7)
    assert idle is None
    x = dataset.inputs["x"][:30].double()
    hidden = (x @ layers[0].weight_matrix.double().T + layers[0].bias.double()).tanh()
    patches = nn.functional.unfold(x[:, None], 4, stride=2, padding=1).mT
    for hessian, tokens in ((q, x), (k, x), (out, hidden), (conv, patches)):
        flat = tokens.flatten(0, 1)
        torch.testing.assert_close(hessian.double(), flat.T @ flat, rtol=1e-5, atol=1e-4)


def test_gptq_beats_nearest_on_validation_rows():
    errors = []
    ordered_gptq = GPTQ(order=activation_order, block_size=8, batch_size=9)
    for method in (RoundToNearest(), GPTQ(), ordered_gptq, GPTQ(rescale=True)):
        module, layers, dataset = make_unit()
        idle = layers[-1].weight_fake_quant(layers[-1].weight_matrix)
        assert method.round_unit(module, layers, dataset, tiny.trainer()) == []
        outputs = module(dataset.inputs["x"][30:])
        unit_errors = []
        for output, target in zip(outputs, dataset.targets.values(), strict=True):
            noise, signal = output - target[30:], target[30:]
            unit_errors.append((noise.square().sum() / signal.square().sum()).item())
        errors.append(unit_errors)
        assert torch.equal(layers[-1].weight_matrix, idle)
        for layer in layers:
            before = layer.weight_matrix.clone()
            layer.commit_weight()
            assert torch.equal(layer.weight_matrix, before)
    nearest, *others = errors
    for better in others:
        assert better[0] < 0.5 * nearest[0]
        assert better[1] < nearest[1]


def test_formats_with_shared_bits_are_refused():
    layer = QuantLayer(
        nn.Linear(8, 4), Quantizer(SharedMantissa(floating(2, 2), 4, "short"), PerChannel())
    )
    with pytest.raises(
        UserError, match="e2m2_share4 shares a bit between 4: choose rounding=nearest"
    ):
        GPTQ().check([layer])


def test_groups_are_rescaled_in_the_natural_order_only():
    with pytest.raises(UserError, match="only in the natural order"):
        GPTQ(order=activation_order, rescale=True).check([])
    selection = FormatSelection([E2M1, integer(4)], LeastError(), "block")
    layer = QuantLayer(nn.Linear(16, 4), Quantizer(selection, GROUP))
    with pytest.raises(UserError, match="choose a format per layer"):
        GPTQ(rescale=True).check([layer])
