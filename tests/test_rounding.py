"""Learnt rounding: what holds before the first step, and what scale-aware AdaRound is under Adam."""

import pytest
import torch
from torch import Tensor, nn

from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.rounding import AdaRound, Learner, Stochastic, logit, ulp, ulp_normalised
from fp4dit.scales import AbsMax, MinMax
from fp4dit.scaling import Scale, Scaling

LEARNERS = [logit, ulp, ulp_normalised]
FORMATS = [floating(2, 1), floating(3, 0), floating(1, 2), floating(3, 4), integer(4), integer(4, signed=False)]
learners = pytest.mark.parametrize("learner", LEARNERS, ids=lambda f: f.__name__)
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def scaling_of(weight: Tensor, fmt: NumberFormat, store: NumberFormat | None = fp16) -> Scaling:
    return (AbsMax if fmt.min else MinMax)(store)(weight, fmt)


def weights(dtype: torch.dtype = torch.float32, rows: int = 64) -> Tensor:
    w = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)) * 0.05
    w[::4] += 0.04  # asymmetric blocks
    w[0] = 0
    return w.to(dtype).float()


def clipped(w: Tensor, fmt: NumberFormat, scaling: Scaling) -> Tensor:
    return scaling.from_grid(scaling.to_grid(w).clamp(fmt.min, fmt.max))


def indecision(rounding: AdaRound, beta: float) -> float:
    return rounding.soft(beta)[1].item()


@learners
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_hard_is_nearest_and_soft_is_the_weight(
    learner: Learner, fmt: NumberFormat, dtype: torch.dtype
):
    w = weights(dtype)
    scaling = scaling_of(w, fmt)
    rounding = learner(w, fmt, scaling)
    expected = Quantizer(fmt, Granularity("row"))(w, scaling)
    assert torch.equal(rounding.hard(), expected)
    torch.testing.assert_close(rounding.soft()[0], clipped(w, fmt, scaling), rtol=1e-5, atol=1e-8)


@learners
@formats
def test_exact_ties_fall_to_the_even_side(learner: Learner, fmt: NumberFormat):
    values = fmt.values()
    ties = ((values[1:] + values[:-1]) / 2)[None]
    for size in (1.0, 2.0**-6, 0.0123, 1e-7):
        scaling = Scale(torch.tensor([[size]]))
        rounding = learner(ties * size, fmt, scaling)
        expected = scaling.from_grid(fmt.nearest(scaling.to_grid(ties * size)))
        assert torch.equal(rounding.hard(), expected)


@formats
def test_ulp_hard_rounding_survives_tiny_and_huge_weights(fmt: NumberFormat):
    """The reference casts its variables to fp16, where tiny ones become -0 and round up."""
    for size in (1e-7, 1e-3, 1e4):
        w = weights()[1:] * size
        scaling = scaling_of(w, fmt, None)
        assert torch.equal(ulp(w, fmt, scaling).hard(), Quantizer(fmt, Granularity("row"))(w, scaling))


@learners
@formats
def test_weights_on_the_grid_are_decided_and_stay(learner: Learner, fmt: NumberFormat):
    scaling = Scale(torch.tensor([[0.25]]))
    rounding = learner(fmt.values()[None] * 0.25, fmt, scaling)
    assert indecision(rounding, 2.0) == pytest.approx(0, abs=1e-4)
    assert torch.equal(rounding.hard(), fmt.values()[None] * 0.25)


@learners
@formats
def test_clipped_weights_have_no_choice_and_no_indecision(learner: Learner, fmt: NumberFormat):
    """A scale stored in fp16 may be a little too small, so that the largest weight lies off the grid."""
    beyond = torch.tensor([[fmt.max * 1.0004, fmt.min * 1.0004, fmt.max * 3, fmt.min * 3 - 1]])
    rounding = learner(beyond, fmt, Scale(torch.ones(1, 1)))
    assert indecision(rounding, 2.0) == pytest.approx(0, abs=1e-4)
    expected = beyond.clamp(fmt.min, fmt.max)
    torch.testing.assert_close(rounding.hard(), expected)
    torch.testing.assert_close(rounding.soft()[0], expected)


@learners
def test_indecision_is_zero_once_decided_and_counts_the_undecided(learner: Learner):
    w, fmt = weights()[1:], floating(2, 1)
    rounding = learner(w, fmt, scaling_of(w, fmt))
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.v >= 0, 10.0, -10.0) * rounding.temperature)
    assert indecision(rounding, 2.0) == 0
    assert torch.equal(rounding.soft()[0], rounding.hard())
    with torch.no_grad():
        rounding.v[0] = 0  # h = 1/2: a full point each
    assert indecision(rounding, 20.0) == pytest.approx(w.shape[1])


def test_indecision_follows_the_formula():
    w, fmt = weights()[1:], floating(2, 1)
    rounding = logit(w, fmt, scaling_of(w, fmt))
    h = (1.2 / (1 + torch.exp(-rounding.v)) - 0.1).clamp(0, 1)
    for beta in (20.0, 2.0):
        torch.testing.assert_close(rounding.soft(beta)[1], (1 - (2 * h - 1).abs() ** beta).sum())


@pytest.mark.parametrize("fmt", [floating(2, 1), integer(4, signed=False)], ids=lambda f: f.name)
def test_soft_weights_are_the_published_formulas(fmt: NumberFormat):
    """FP: clip(s (floor(u) + h)); INT: d (clip(floor(W/d) + h + zp) - zp), for any V."""
    w = weights()[1:]
    scaling = scaling_of(w, fmt, None)
    rounding = logit(w, fmt, scaling)
    with torch.no_grad():
        rounding.v.normal_(generator=torch.Generator().manual_seed(2))
    h = (1.2 * torch.sigmoid(rounding.v) - 0.1).clamp(0, 1)
    if fmt.min:
        x = w / scaling.scale
        step = fmt.step(x.abs().clamp(max=fmt.max))
        up = torch.where(x < 0, 1 - h, h)  # ours goes outwards, theirs upwards: one bracket seen from two sides
        expected = (step * ((x / step).floor() + up)).clamp(fmt.min, fmt.max) * scaling.scale
    else:
        d, zero = scaling.scale, scaling.from_grid(torch.zeros_like(w)) / -scaling.scale
        expected = d * (((w / d).floor() + h + zero.round()).clamp(0, fmt.max) - zero.round())
    inside = (scaling.to_grid(w) > fmt.min) & (scaling.to_grid(w) < fmt.max)
    torch.testing.assert_close(rounding.soft()[0][inside], expected[inside], rtol=1e-4, atol=1e-7)


def train(rounding: AdaRound, x: Tensor, w: Tensor, lr: Tensor, eps: Tensor) -> None:
    """50 steps of stock Adam, every weight a tensor with its own `lr` and `eps`."""
    one_each = [nn.Parameter(v.clone()) for v in rounding.v.detach().flatten()]
    own = zip(one_each, lr.flatten().tolist(), eps.flatten().tolist(), strict=True)
    optimizer = torch.optim.Adam([{"params": [p], "lr": rate, "eps": e} for p, rate, e in own])
    for step in range(50):
        rounding.zero_grad()
        soft, left = rounding.soft(20 - step / 3, torch.float64)
        ((x @ (soft - w).T).square().mean() + 1e-4 * left).backward()
        for p, g in zip(one_each, rounding.v.grad.flatten(), strict=True):
            p.grad = g.clone()
        optimizer.step()
        rounding.v.data.copy_(torch.stack([p.detach() for p in one_each]).view_as(w))


def test_scale_aware_is_logit_adaround_with_a_learning_rate_per_weight():
    """In fp64, under Adam whose eps scales with the step, over 50 steps, to 1e-12."""
    w = weights(rows=9)[1:, :8].double()
    x = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    scaling = AbsMax()(w, floating(2, 1))
    aware, plain = ulp(w, floating(2, 1), scaling), logit(w, floating(2, 1), scaling)
    start, step = plain.v.detach().clone(), aware.temperature
    assert aware.v.dtype == torch.float64
    assert len(step.unique()) > 8
    lr, eps = torch.full_like(w, 1e-3), torch.full_like(w, 1e-8)
    train(aware, x, w, lr, eps)
    train(plain, x, w, lr / step, eps * step)
    assert (plain.v - start).abs().max() > 0.5
    torch.testing.assert_close(aware.v / step, plain.v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [2.0**-7, 8.0, 3.0])
def test_normalised_variables_do_not_see_the_size_of_the_weights(factor: float):
    w, fmt = weights()[1:], floating(2, 1)
    small, large = (learn_at(w * size, fmt, ulp_normalised) for size in (1.0, factor))
    torch.testing.assert_close(small.v, large.v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(small.temperature, large.temperature)
    assert small.temperature.mean().item() == pytest.approx(1)
    raw = learn_at(w * factor, fmt, ulp)
    torch.testing.assert_close(raw.temperature, learn_at(w, fmt, ulp).temperature * factor)


def learn_at(w: Tensor, fmt: NumberFormat, learner: Learner) -> AdaRound:
    return learner(w, fmt, scaling_of(w, fmt, None))


@formats
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour(fmt: NumberFormat):
    """Of 20 values spread over the range, 5,000 times each, the mean lies within 4 standard errors."""
    g, count = torch.Generator().manual_seed(4), 5000
    x = fmt.min + (fmt.max - fmt.min) * torch.rand(20, 1, generator=g)
    inner, outer = fmt.bracket(x)
    rounded = Stochastic(seed=1)(x.expand(20, count).contiguous(), fmt)
    assert ((rounded == inner) | (rounded == outer)).all()
    share = (x - inner) / (outer - inner)
    error = (outer - inner).abs() * (share * (1 - share) / count).sqrt()
    assert ((rounded.mean(1, keepdim=True) - x).abs() <= 4 * error + 1e-5 * x.abs()).all()
    assert (rounded.std(1) > 0).any()


@formats
def test_stochastic_rounding_leaves_the_grid_alone_and_clips_what_lies_beyond(fmt: NumberFormat):
    values = fmt.values()
    assert torch.equal(Stochastic()(values, fmt), values)
    beyond = torch.linspace(0.01, 0.99, 50)
    assert (Stochastic()(fmt.min - beyond, fmt) == fmt.min).all()
    assert (Stochastic()(fmt.max + beyond, fmt) == fmt.max).all()


def test_the_seed_and_the_values_fix_the_choices_whatever_came_before():
    fmt, a, b = floating(2, 1), weights() * 20, weights().flip(0) * 20
    rounding = Stochastic(3)
    first = rounding(a, fmt)
    rounding(b, fmt)
    assert torch.equal(rounding(a, fmt), first)
    assert torch.equal(Stochastic(3)(a, fmt), first)
    assert not torch.equal(Stochastic(4)(a, fmt), first)
    same = torch.full((2, 400), 0.6)
    same[1, -1] = 0.7
    up = rounding(same[:1], fmt), rounding(same[1:], fmt)
    assert not torch.equal(up[0], up[1])  # other values, other draws
