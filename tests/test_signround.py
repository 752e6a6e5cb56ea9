"""SignRound: nothing moves before training, how far it can move then, gradients by hand, and how scales are kept."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fp4dit.blockscales import E8M0, NVFP4
from fp4dit.calls import Call
from fp4dit.choice import Choice, LeastError
from fp4dit.examples import Examples
from fp4dit.formats import Format, floating, fp16, integer, nf4
from fp4dit.layer import wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.scaling import Scale, Scaling, parts
from fp4dit.signround import (
    Shift,
    SignRound,
    SignSGD,
    Store,
    in_format,
    in_format_per_tensor,
    in_scale,
    in_ulp,
    linear_decay,
)
from fp4dit.stream import Unit
from fp4dit.tasks.reconstruct import Learnt, Relative
from tests import tiny

E2M1 = floating(2, 1)
HALF, POWER = partial(in_format, fmt=fp16), partial(in_format, fmt=floating(8, 0, reserved=1, signed=False))
KINDS: dict[str, tuple[Format, Callable, Store]] = {
    "e2m1": (E2M1, AbsMax(fp16), HALF),
    "e3m0": (floating(3, 0), AbsMax(), in_format),
    "int4": (integer(4), AbsMax(fp16), HALF),
    "affine": (integer(4, signed=False), MinMax(fp16), HALF),
    "nf4": (nf4, AbsMax(fp16), HALF),
    "two-sided": (E2M1, TwoSidedAbsMax(fp16), HALF),
    "mx": (E2M1, E8M0(), POWER),
    "nvfp4": (E2M1, NVFP4(), in_format_per_tensor),
}
kinds = pytest.mark.parametrize("kind", KINDS)
shifts = pytest.mark.parametrize("shift", [in_scale, in_ulp], ids=lambda f: f.__name__)


def weights(seed: int = 1, rows: int = 64, block: int = 16) -> Tensor:
    w = torch.randn(rows, block, generator=torch.Generator().manual_seed(seed)) * 0.05
    w[::4] += 0.04  # asymmetric blocks
    w[0] = 0
    return w


def nearest(w: Tensor, scaling: Scaling, fmt: Format) -> Tensor:
    return scaling.from_grid(fmt.nearest(scaling.to_grid(w)))


def levels(grid: Tensor, fmt: Format) -> Tensor:
    """The place of each grid point among the values of the format."""
    place = torch.searchsorted(fmt.values(), grid.contiguous())
    assert torch.equal(fmt.values()[place], grid)
    return place


@kinds
@shifts
@pytest.mark.parametrize("tuned", [False, True])
def test_before_training_it_is_nearest_and_the_scales_are_those_measured(kind: str, shift: Shift, tuned: bool):
    w, (fmt, rule, store) = weights(), KINDS[kind]
    scaling = rule(w, fmt)
    rounding = SignRound(w, fmt, scaling, shift, store if tuned else None)
    assert torch.equal(rounding.hard(), nearest(w, scaling, fmt))
    learnt_with, indecision = rounding.soft(2.0)
    assert torch.equal(learnt_with, rounding.hard())
    assert indecision == 0
    assert (rounding.scaling is not None) == tuned
    if rounding.scaling is not None:
        assert type(rounding.scaling) is type(scaling)
        for name, part in parts(rounding.scaling).items():
            assert torch.equal(part, parts(scaling)[name])
            assert not part.requires_grad


@settings(max_examples=30)
@given(kind=st.sampled_from(list(KINDS)), seed=st.integers(0, 999), edge=st.booleans())
def test_in_local_steps_no_weight_moves_by_more_than_one_level(kind: str, seed: int, edge: bool):
    w, (fmt, rule, _) = weights(seed), KINDS[kind]
    scaling = rule(w, fmt)
    rounding = SignRound(w, fmt, scaling, in_ulp)
    v = torch.rand(w.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    rounding.v.data.copy_(v.sign() / 2 if edge else v)
    x = scaling.to_grid(w)
    inner, outer = fmt.bracket(x)
    hard = rounding.hard()
    assert ((hard == scaling.from_grid(inner)) | (hard == scaling.from_grid(outer))).all()
    assert not torch.equal(hard, nearest(w, scaling, fmt))
    if kind != "two-sided":  # whose levels from_grid and to_grid do not bring back bit by bit
        moved = levels(fmt.nearest(scaling.to_grid(hard)), fmt) - levels(fmt.nearest(x), fmt)
        assert moved.abs().max() == 1


@pytest.mark.parametrize("fmt", [E2M1, floating(3, 0), integer(4)], ids=lambda f: f.name)
def test_in_local_steps_every_weight_inside_its_bracket_can_take_either_side(fmt: Format):
    w = weights()[1:]
    scaling = AbsMax()(w, fmt)
    inner, outer = fmt.bracket(scaling.to_grid(w))
    rounding = SignRound(w, fmt, scaling, in_ulp)
    inside = (scaling.to_grid(w) != inner) & (outer != inner)
    found = []
    for v in (-0.5, 0.5):
        rounding.v.data.fill_(v)
        found.append(rounding.hard()[inside])
    torch.testing.assert_close(found[0], scaling.from_grid(torch.minimum(inner, outer))[inside], rtol=0, atol=0)
    torch.testing.assert_close(found[1], scaling.from_grid(torch.maximum(inner, outer))[inside], rtol=0, atol=0)


def test_on_e2m1_a_shift_in_units_of_the_scale_is_weak_where_steps_are_long_and_wild_where_short():
    """Of Gaussian weights in blocks of 16, only a third of those in the last binade can flip at all."""
    w = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    scaling = AbsMax()(w, E2M1)
    x = scaling.to_grid(w).abs()
    still = levels(E2M1.nearest(scaling.to_grid(w)), E2M1)

    def moves(shift: Shift) -> Tensor:
        rounding, found = SignRound(w, E2M1, scaling, shift), []
        for v in (-0.5, 0.5):
            rounding.v.data.fill_(v)
            found.append((levels(E2M1.nearest(scaling.to_grid(rounding.hard())), E2M1) - still).abs())
        return torch.maximum(*found)

    coarse, fine = x > 4, x < 1.5
    assert (moves(in_scale)[coarse] > 0).float().mean().item() == pytest.approx(0.33, abs=0.03)
    assert moves(in_ulp)[coarse & (x < 6)].min() == 1
    inner = x < 1  # where the step is 1/2, a shift of 1/2 always moves one level; none needs more
    assert moves(in_scale)[inner].min() == 1
    assert moves(in_scale)[fine].max() >= 1
    assert moves(in_ulp)[fine].max() == 1


def test_gradients_are_straight_through_by_hand():
    """Grid 0 .5 1 1.5 2 3 4 6; at scale 2 the weights are at 0.7, 2.2, -4.9, 9 (cut off) and 6 (the end itself)."""
    w = torch.tensor([[1.4, 4.4, -9.8, 18.0, 12.0]])
    c = torch.tensor([[1.0, -2.0, 3.0, 5.0, -7.0]])
    grid, x, inside = torch.tensor([[0.5, 2.0, -4.0, 6.0, 6.0]]), w / 2, torch.tensor([[1, 1, 1, 0, 1]])
    for shift, width in ((in_scale, 1.0), (in_ulp, torch.tensor([[0.5, 1.0, 2.0, 0.0, 0.0]]))):
        rounding = SignRound(w, E2M1, Scale(torch.tensor([[2.0]])), shift, HALF)
        soft, _ = rounding.soft()
        torch.testing.assert_close(soft, 2 * grid)
        (soft * c).sum().backward()
        torch.testing.assert_close(rounding.v.grad, 2 * c * width * inside)
        # scale = 2 high, x = w / scale: d(scale * grid) / d high = 2 grid - 2 x where rounding passes gradients
        torch.testing.assert_close(rounding.high.grad, (c * (2 * grid - 2 * x * inside)).sum()[None, None])
        assert rounding.low.grad is None


def test_gradients_of_both_ends_of_an_affine_range_by_hand():
    """Of values that are cut off: the upper end moves with `high` alone; the zero point's rounding is passed."""
    fmt, scaling = integer(4, signed=False), MinMax()(torch.tensor([[-5.0, 10.0]]), integer(4, signed=False))
    rounding = SignRound(torch.tensor([[100.0, -100.0]]), fmt, scaling, in_scale, in_format)
    soft, _ = rounding.soft()
    torch.testing.assert_close(soft, torch.tensor([[10.0, -5.0]]))
    (soft * torch.tensor([[3.0, 7.0]])).sum().backward()
    torch.testing.assert_close(rounding.high.grad, torch.tensor([[30.0]]))
    torch.testing.assert_close(rounding.low.grad, torch.tensor([[-35.0]]))


@kinds
def test_a_drawn_in_range_keeps_its_scales_as_they_are_stored(kind: str):
    w, (fmt, rule, store) = weights(), KINDS[kind]
    scaling = rule(w, fmt)
    rounding = SignRound(w, fmt, scaling, in_scale, store)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        rounding.high.copy_(1 - torch.rand(rounding.high.shape, generator=g) * 0.7)  # below 1/2 too: projected
        rounding.low.copy_(1 - torch.rand(rounding.low.shape, generator=g) * 0.7)
    hard, tuned = rounding.hard(), rounding.scaling
    assert rounding.high.min() == 0.5
    assert tuned is not None
    for name, part in parts(tuned).items():
        before = parts(scaling)[name]
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
            torch.testing.assert_close(codes, codes.to(torch.float8_e4m3fn).float(), rtol=1e-6, atol=0)
    assert torch.equal(nearest(hard, tuned, fmt), hard)  # what is saved reads back as what was learnt


def test_an_affine_range_ends_where_its_factors_say():
    w, fmt = weights()[1:], integer(4, signed=False)
    scaling = MinMax()(w, fmt)
    rounding = SignRound(w, fmt, scaling, in_scale, in_format)
    rounding.low.data.fill_(0.5)
    tuned = rounding.scaling
    ends = torch.tensor([fmt.min, fmt.max]).expand(len(w), 2)
    before, after = scaling.from_grid(ends), tuned.from_grid(ends)
    # The zero point is whole, which moves a range by up to half a step.
    assert ((after[:, :1] - before[:, :1] / 2).abs() <= tuned.scale * 0.5001).all()
    assert ((after[:, 1:] - before[:, 1:]).abs() <= tuned.scale * 0.5001).all()


def test_a_scaling_that_nobody_can_draw_in_is_an_error():
    w, fmt = weights(), floating(2, 2, signed=False)
    scaling = OffsetRange()(w, fmt)
    assert torch.equal(SignRound(w, fmt, scaling).hard(), nearest(w, scaling, fmt))
    with pytest.raises(ValueError, match="Offset cannot be learnt"):
        SignRound(w, fmt, scaling, store=in_format).hard()


@shifts
def test_a_format_of_its_own_for_each_block(shift: Shift):
    w = weights()[1:]
    choice = Choice([integer(4), floating(3, 0)], LeastError(), per="block")
    fmt = choice.pick(choice.choose(w, AbsMax()))
    scaling = AbsMax()(w, fmt)
    rounding = SignRound(w, fmt, scaling, shift, HALF)
    assert torch.equal(rounding.hard(), nearest(w, scaling, fmt))
    rounding.v.data.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(3))
    hard = rounding.hard()
    assert torch.equal(nearest(hard, scaling, fmt), hard)
    assert not torch.equal(hard, nearest(w, scaling, fmt))


def test_the_optimizer_takes_steps_of_one_size_that_shrink_to_nothing():
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = SignSGD([p], lr=0.25)
    schedule = linear_decay(optimizer, 4)
    seen = []
    for _ in range(5):
        p.grad = torch.tensor([123.0, -1e-9, 0.0])
        optimizer.step()
        schedule.step()
        seen.append(p.detach().clone())
    steps = torch.tensor([0.25, 0.1875, 0.125, 0.0625, 0.0])
    torch.testing.assert_close(torch.stack(seen)[:, 0], 1 - steps.cumsum(0))
    torch.testing.assert_close(torch.stack(seen)[:, 1], 2 + steps.cumsum(0))
    assert (torch.stack(seen)[:, 2] == 3).all()


def fitted(learner: Callable, quantizer: Quantizer, steps: int, keep_best: bool = True) -> tuple[float, nn.Module]:
    """Relative output error on held-out rows of a layer with correlated inputs."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(192, 5, 6, generator=g) @ torch.randn(6, 32, generator=g)
    torch.manual_seed(0)
    linear = nn.Linear(32, 16).requires_grad_(False)
    target = linear(x)
    layer = wrap(linear, quantizer).prepare()
    fit = Learnt(
        learner,
        partial(SignSGD, lr=1 / steps),
        Relative(),
        steps,
        batch=128,
        schedule=partial(linear_decay, steps=steps),
        keep_best=keep_best,
    )
    unit = Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",))
    fit(layer, [layer], Examples(unit, {"x": x}, {"y": target}, torch.arange(128)), tiny.trainer())
    error = (layer(x[128:]) - target[128:]).square().sum() / target[128:].square().sum()
    return error.item(), layer


@pytest.mark.parametrize(("kind", "shift"), [("e2m1", in_ulp), ("affine", in_scale), ("nvfp4", in_scale)])
def test_it_beats_nearest_on_held_out_inputs(kind: str, shift: Shift):
    fmt, rule, store = KINDS[kind]
    quantizer = Quantizer(fmt, Granularity("group", 16), rule)
    still, _ = fitted(partial(SignRound, shift=lambda x, v, fmt: x + 0 * v), quantizer, 1)
    learnt, _ = fitted(partial(SignRound, shift=shift), quantizer, 100)
    tuned, layer = fitted(partial(SignRound, shift=shift, store=store), quantizer, 100)
    assert learnt < 0.75 * still
    assert tuned < 0.75 * still
    before = layer.rows.clone()
    layer.freeze()
    assert torch.equal(layer.rows, before)  # the scales that were learnt are those that the layer holds
