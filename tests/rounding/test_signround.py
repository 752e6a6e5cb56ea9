"""Test SignRound: values before training, range of the shift, gradients, rounding of scales."""

from collections.abc import Callable
from functools import partial

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
from fp4dit.numerics.qparams import QParams, Scale, as_tensors
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.rounding.learned_range import (
    ScaleRounding,
    round_scale_to_format,
    round_scale_to_tensor_units,
)
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.rounding.signround import (
    ShiftFunction,
    SignRound,
    SignSGD,
    linear_decay,
    shift_in_scale_units,
    shift_in_ulp,
)
from fp4dit.utils.calls import Call
from tests.helpers import tiny

E2M1 = floating(2, 1)
HALF, POWER = (
    partial(round_scale_to_format, fmt=fp16),
    partial(round_scale_to_format, fmt=floating(8, 0, reserved=1, signed=False)),
)
KINDS: dict[str, tuple[Format, Callable, ScaleRounding]] = {
    "e2m1": (E2M1, AbsMax(fp16), HALF),
    "e3m0": (floating(3, 0), AbsMax(), round_scale_to_format),
    "int4": (integer(4), AbsMax(fp16), HALF),
    "affine": (integer(4, signed=False), MinMax(fp16), HALF),
    "nf4": (nf4, AbsMax(fp16), HALF),
    "two-sided": (E2M1, TwoSidedAbsMax(fp16), HALF),
    "mx": (E2M1, E8M0Scale(), POWER),
    "nvfp4": (E2M1, NVFP4Scale(), round_scale_to_tensor_units),
}
kinds = pytest.mark.parametrize("kind", KINDS)
shifts = pytest.mark.parametrize(
    "shift", [shift_in_scale_units, shift_in_ulp], ids=lambda f: f.__name__
)


def make_asymmetric_weights(seed: int = 1, rows: int = 64, block: int = 16) -> Tensor:
    w = torch.randn(rows, block, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[::4] += 0.04  # asymmetric blocks
    w[0] = 0
    return w


def round_weights(w: Tensor, qparams: QParams, fmt: Format) -> Tensor:
    return qparams.from_grid(fmt.nearest(qparams.to_grid(w)))


def level_index(grid: Tensor, fmt: Format) -> Tensor:
    """Return the index of each grid value among the values of the format."""
    index = torch.searchsorted(fmt.values(), grid.contiguous())
    assert torch.equal(fmt.values()[index], grid)
    return index


@kinds
@shifts
@pytest.mark.parametrize("tuned", [False, True])
def test_before_training_it_rounds_to_nearest_with_same_scales(
    kind: str, shift: ShiftFunction, tuned: bool
):
    w, (fmt, rule, store) = make_asymmetric_weights(), KINDS[kind]
    qparams = rule(w, fmt)
    rounding = SignRound(w, fmt, qparams, shift, store if tuned else None)
    assert torch.equal(rounding.hard_weight(), round_weights(w, qparams, fmt))
    soft, rounding_loss = rounding.soft_weight(2.0)
    assert torch.equal(soft, rounding.hard_weight())
    assert rounding_loss == 0
    assert (rounding.learned_qparams is not None) == tuned
    if rounding.learned_qparams is not None:
        assert type(rounding.learned_qparams) is type(qparams)
        for name, part in as_tensors(rounding.learned_qparams).items():
            assert torch.equal(part, as_tensors(qparams)[name])
            assert not part.requires_grad


@settings(max_examples=30)
@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 999), edge=st.booleans())
def test_shift_in_ulp_moves_by_at_most_one_level(kind: str, seed: int, edge: bool):
    w, (fmt, rule, _) = make_asymmetric_weights(seed), KINDS[kind]
    qparams = rule(w, fmt)
    rounding = SignRound(w, fmt, qparams, shift_in_ulp)
    v = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    rounding.v.data.copy_(v.sign() / 2 if edge else v)
    x = qparams.to_grid(w)
    inner, outer = fmt.bracket(x)
    hard = rounding.hard_weight()
    assert ((hard == qparams.from_grid(inner)) | (hard == qparams.from_grid(outer))).all()
    assert not torch.equal(hard, round_weights(w, qparams, fmt))
    if kind != "two-sided":  # from_grid and to_grid are not exact inverses for it
        moved = level_index(fmt.nearest(qparams.to_grid(hard)), fmt) - level_index(
            fmt.nearest(x), fmt
        )
        assert moved.abs().max() == 1


@pytest.mark.parametrize("fmt", [E2M1, floating(3, 0), integer(4)], ids=lambda f: f.name)
def test_shift_in_ulp_reaches_both_neighbors(fmt: Format):
    w = make_asymmetric_weights()[1:]
    qparams = AbsMax()(w, fmt)
    inner, outer = fmt.bracket(qparams.to_grid(w))
    rounding = SignRound(w, fmt, qparams, shift_in_ulp)
    inside = (qparams.to_grid(w) != inner) & (outer != inner)
    sides = []
    for v in (-0.5, 0.5):
        rounding.v.data.fill_(v)
        sides.append(rounding.hard_weight()[inside])
    torch.testing.assert_close(
        sides[0], qparams.from_grid(torch.minimum(inner, outer))[inside], rtol=0, atol=0
    )
    torch.testing.assert_close(
        sides[1], qparams.from_grid(torch.maximum(inner, outer))[inside], rtol=0, atol=0
    )


def test_shift_in_scale_units_depends_on_the_step_of_e2m1():
    """In blocks of 16 Gaussian weights, only a third of those in the last binade can flip."""
    w = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    qparams = AbsMax()(w, E2M1)
    x = qparams.to_grid(w).abs()
    initial = level_index(E2M1.nearest(qparams.to_grid(w)), E2M1)

    def moves(shift: ShiftFunction) -> Tensor:
        rounding, sides = SignRound(w, E2M1, qparams, shift), []
        for v in (-0.5, 0.5):
            rounding.v.data.fill_(v)
            grid = E2M1.nearest(qparams.to_grid(rounding.hard_weight()))
            sides.append((level_index(grid, E2M1) - initial).abs())
        return torch.maximum(*sides)

    coarse, fine = x > 4, x < 1.5
    assert (moves(shift_in_scale_units)[coarse] > 0).float().mean().item() == pytest.approx(
        0.33, abs=0.03
    )
    assert moves(shift_in_ulp)[coarse & (x < 6)].min() == 1
    inner = x < 1  # the step is 1/2, so that a shift of 1/2 moves one level
    assert moves(shift_in_scale_units)[inner].min() == 1
    assert moves(shift_in_scale_units)[fine].max() >= 1
    assert moves(shift_in_ulp)[fine].max() == 1


def test_gradients_are_straight_through_by_hand():
    """The grid is 0, 0.5, 1, 1.5, 2, 3, 4, 6.

    At scale 2 the weights are at 0.7, 2.2, -4.9, 9 (clipped) and 6 (the end itself).
    """
    w = torch.tensor([[1.4, 4.4, -9.8, 18.0, 12.0]])
    c = torch.tensor([[1.0, -2.0, 3.0, 5.0, -7.0]])
    grid, x = torch.tensor([[0.5, 2.0, -4.0, 6.0, 6.0]]), w / 2
    inside = torch.tensor([[1, 1, 1, 0, 1]])
    for shift, width in (
        (shift_in_scale_units, 1.0),
        (shift_in_ulp, torch.tensor([[0.5, 1.0, 2.0, 0.0, 0.0]])),
    ):
        rounding = SignRound(w, E2M1, Scale(torch.tensor([[2.0]])), shift, HALF)
        soft, _ = rounding.soft_weight()
        torch.testing.assert_close(soft, 2 * grid)
        (soft * c).sum().backward()
        torch.testing.assert_close(rounding.v.grad, 2 * c * width * inside)
        # With scale = 2 high and x = w / scale, d(scale * grid) / d high is 2 grid - 2 x where
        # rounding passes gradients.
        torch.testing.assert_close(
            rounding.high_factor.grad, (c * (2 * grid - 2 * x * inside)).sum()[None, None]
        )
        assert rounding.low_factor.grad is None


def test_gradients_of_both_ends_of_an_affine_range_by_hand():
    """Clipped values depend on one end only. Gradients pass the rounding of the zero point."""
    fmt = integer(4, signed=False)
    qparams = MinMax()(torch.tensor([[-5.0, 10.0]]), fmt)
    rounding = SignRound(
        torch.tensor([[100.0, -100.0]]), fmt, qparams, shift_in_scale_units, round_scale_to_format
    )
    soft, _ = rounding.soft_weight()
    torch.testing.assert_close(soft, torch.tensor([[10.0, -5.0]]))
    (soft * torch.tensor([[3.0, 7.0]])).sum().backward()
    torch.testing.assert_close(rounding.high_factor.grad, torch.tensor([[30.0]]))
    torch.testing.assert_close(rounding.low_factor.grad, torch.tensor([[-35.0]]))


@kinds
def test_scales_of_a_smaller_range_are_in_their_dtype(kind: str):
    w, (fmt, rule, store) = make_asymmetric_weights(), KINDS[kind]
    qparams = rule(w, fmt)
    rounding = SignRound(w, fmt, qparams, shift_in_scale_units, store)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        # Factors below 1/2 are clamped.
        rounding.high_factor.copy_(1 - torch.rand(rounding.high_factor.shape, generator=g) * 0.7)
        rounding.low_factor.copy_(1 - torch.rand(rounding.low_factor.shape, generator=g) * 0.7)
    hard, tuned = rounding.hard_weight(), rounding.learned_qparams
    assert rounding.high_factor.min() == 0.5
    assert tuned is not None
    for name, part in as_tensors(tuned).items():
        before = as_tensors(qparams)[name]
        if name == "zero":
            assert torch.equal(part, part.round())
            assert part.min() >= 0
            continue
        assert (part <= before).all()
        assert (part >= before * 0.49).all()
        if store is HALF:
            assert torch.equal(part, part.half().float())
        if kind == "mx":
            assert (torch.frexp(part).mantissa == 0.5).all()
        if kind == "nvfp4":
            codes = part / (w.abs().amax() / (448 * 6))
            torch.testing.assert_close(
                codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0
            )
    assert torch.equal(round_weights(hard, tuned, fmt), hard)


def test_an_affine_range_ends_where_its_factors_say():
    w, fmt = make_asymmetric_weights()[1:], integer(4, signed=False)
    qparams = MinMax()(w, fmt)
    rounding = SignRound(w, fmt, qparams, shift_in_scale_units, round_scale_to_format)
    rounding.low_factor.data.fill_(0.5)
    tuned = rounding.learned_qparams
    ends = torch.tensor([fmt.min, fmt.max]).expand(len(w), 2)
    before, after = qparams.from_grid(ends), tuned.from_grid(ends)
    # The zero point is an integer, which moves a range by up to half a step.
    assert ((after[:, :1] - before[:, :1] / 2).abs() <= tuned.scale * 0.5001).all()
    assert ((after[:, 1:] - before[:, 1:]).abs() <= tuned.scale * 0.5001).all()


def test_learning_an_unsupported_range_is_an_error():
    w, fmt = make_asymmetric_weights(), floating(2, 2, signed=False)
    qparams = OffsetRange()(w, fmt)
    assert torch.equal(SignRound(w, fmt, qparams).hard_weight(), round_weights(w, qparams, fmt))
    with pytest.raises(ValueError, match="Offset cannot be learned"):
        SignRound(w, fmt, qparams, scale_rounding=round_scale_to_format).hard_weight()


@shifts
def test_formats_selected_per_block(shift: ShiftFunction):
    w = make_asymmetric_weights()[1:]
    selection = FormatSelection([integer(4), floating(3, 0)], LeastError(), per="block")
    fmt = selection.format_at(selection.select_formats(w, AbsMax()))
    qparams = AbsMax()(w, fmt)
    rounding = SignRound(w, fmt, qparams, shift, HALF)
    assert torch.equal(rounding.hard_weight(), round_weights(w, qparams, fmt))
    rounding.v.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    hard = rounding.hard_weight()
    assert torch.equal(round_weights(hard, qparams, fmt), hard)
    assert not torch.equal(hard, round_weights(w, qparams, fmt))


def test_sign_sgd_steps_have_equal_size_and_decay_to_zero():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = SignSGD([p], lr=0.25)
    schedule = linear_decay(optimizer, 4)
    values = []
    for _ in range(5):
        p.grad = torch.tensor([123.0, -1e-9, 0.0])
        optimizer.step()
        schedule.step()
        values.append(p.detach().clone())
    steps = torch.tensor([0.25, 0.1875, 0.125, 0.0625, 0.0])
    torch.testing.assert_close(torch.stack(values)[:, 0], 1 - steps.cumsum(0))
    torch.testing.assert_close(torch.stack(values)[:, 1], 2 + steps.cumsum(0))
    assert (torch.stack(values)[:, 2] == 3).all()


def learn_layer(
    learner: Callable, quantizer: Quantizer, steps: int, keep_best: bool = True
) -> tuple[float, nn.Module]:
    """Learn a layer with correlated inputs, and return its relative error on validation rows."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(192, 5, 6, generator=g) @ torch.randn(6, 32, generator=g)
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).requires_grad_(False)
    target = linear(x)
    layer = make_quant_layer(linear, quantizer).prepare()
    method = LearnedRounding(
        learner,
        partial(SignSGD, lr=1 / steps),
        RelativeMSE(),
        steps,
        batch_size=128,
        schedule=partial(linear_decay, steps=steps),
        keep_best=keep_best,
    )
    unit = Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",))
    dataset = UnitDataset(unit, {"x": x}, {"y": target}, torch.arange(128))
    method.round_unit(layer, [layer], dataset, tiny.trainer())
    error = (layer(x[128:]) - target[128:]).square().sum() / target[128:].square().sum()
    return error.item(), layer


@pytest.mark.parametrize(
    ("kind", "shift"),
    [("e2m1", shift_in_ulp), ("affine", shift_in_scale_units), ("nvfp4", shift_in_scale_units)],
)
def test_signround_beats_nearest_on_validation_rows(kind: str, shift: ShiftFunction):
    fmt, rule, store = KINDS[kind]
    quantizer = Quantizer(fmt, PerGroup(16), rule)
    nearest, _ = learn_layer(partial(SignRound, shift=lambda x, v, fmt: x + 0 * v), quantizer, 1)
    learned, _ = learn_layer(partial(SignRound, shift=shift), quantizer, 100)
    tuned, layer = learn_layer(
        partial(SignRound, shift=shift, scale_rounding=store), quantizer, 100
    )
    assert learned < 0.75 * nearest
    assert tuned < 0.75 * nearest
    before = layer.weight_matrix.clone()
    layer.commit_weight()
    # The layer has the learned scales.
    assert torch.equal(layer.weight_matrix, before)
