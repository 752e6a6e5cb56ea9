"""Test AdaRound before training, scale-aware AdaRound under Adam, and stochastic rounding."""

import pytest
import torch
from torch import Tensor, nn

from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.qparams import QParams, Scale
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.numerics.rounding import StochasticRounding
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.quantization.learnable_rounding import RoundingFactory
from fp4dit.rounding.adaround import (
    AdaRound,
    adaround,
    adaround_scale_aware,
    adaround_scale_aware_normalized,
)

LEARNERS = [adaround, adaround_scale_aware, adaround_scale_aware_normalized]
FORMATS = [
    floating(2, 1),
    floating(3, 0),
    floating(1, 2),
    floating(3, 4),
    integer(4),
    integer(4, signed=False),
]
learners = pytest.mark.parametrize("learner", LEARNERS, ids=lambda f: f.__name__)
formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)


def choose_qparams(weight: Tensor, fmt: NumberFormat, dtype: NumberFormat | None = fp16) -> QParams:
    return (AbsMax if fmt.min else MinMax)(dtype)(weight, fmt)


def make_weights(dtype: torch.dtype = torch.float32, rows: int = 64) -> Tensor:
    w = torch.randn(rows, 32, generator=torch.Generator().manual_seed(1)) * 0.05
    w[::4] += 0.04  # asymmetric blocks
    w[0] = 0
    return w.to(dtype).float()


def clip_weights(w: Tensor, fmt: NumberFormat, qparams: QParams) -> Tensor:
    return qparams.from_grid(qparams.to_grid(w).clamp(fmt.min, fmt.max))


def rounding_loss(rounding: AdaRound, beta: float) -> float:
    return rounding.soft_weight(beta)[1].item()


@learners
@formats
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_training_hard_is_nearest_and_soft_is_the_weight(
    learner: RoundingFactory, fmt: NumberFormat, dtype: torch.dtype
):
    w = make_weights(dtype)
    qparams = choose_qparams(w, fmt)
    rounding = learner(w, fmt, qparams)
    expected = Quantizer(fmt, PerChannel())(w, qparams)
    assert torch.equal(rounding.hard_weight(), expected)
    torch.testing.assert_close(
        rounding.soft_weight()[0], clip_weights(w, fmt, qparams), rtol=1e-5, atol=1e-8
    )


@learners
@formats
def test_exact_ties_fall_to_the_even_side(learner: RoundingFactory, fmt: NumberFormat):
    values = fmt.values()
    ties = ((values[1:] + values[:-1]) / 2)[None]
    for size in (1.0, 2.0**-6, 0.0123, 1e-7):
        qparams = Scale(torch.tensor([[size]]))
        rounding = learner(ties * size, fmt, qparams)
        expected = qparams.from_grid(fmt.nearest(qparams.to_grid(ties * size)))
        assert torch.equal(rounding.hard_weight(), expected)


@formats
def test_scale_aware_rounding_of_tiny_and_huge_weights(fmt: NumberFormat):
    """The published code casts its variables to fp16, so that tiny ones become -0 and round up."""
    for size in (1e-7, 1e-3, 1e4):
        w = make_weights()[1:] * size
        qparams = choose_qparams(w, fmt, None)
        assert torch.equal(
            adaround_scale_aware(w, fmt, qparams).hard_weight(),
            Quantizer(fmt, PerChannel())(w, qparams),
        )


@learners
@formats
def test_weights_on_the_grid_are_decided_and_do_not_change(
    learner: RoundingFactory, fmt: NumberFormat
):
    qparams = Scale(torch.tensor([[0.25]]))
    rounding = learner(fmt.values()[None] * 0.25, fmt, qparams)
    assert rounding_loss(rounding, 2.0) == pytest.approx(0, abs=1e-4)
    assert torch.equal(rounding.hard_weight(), fmt.values()[None] * 0.25)


@learners
@formats
def test_clipped_weights_are_decided_and_have_no_loss(learner: RoundingFactory, fmt: NumberFormat):
    """A scale in fp16 can be a little too small, so that the largest weight is off the grid."""
    beyond = torch.tensor([[fmt.max * 1.0004, fmt.min * 1.0004, fmt.max * 3, fmt.min * 3 - 1]])
    rounding = learner(beyond, fmt, Scale(torch.ones(1, 1)))
    assert rounding_loss(rounding, 2.0) == pytest.approx(0, abs=1e-4)
    expected = beyond.clamp(fmt.min, fmt.max)
    torch.testing.assert_close(rounding.hard_weight(), expected)
    torch.testing.assert_close(rounding.soft_weight()[0], expected)


@learners
def test_rounding_loss_is_zero_once_decided(learner: RoundingFactory):
    w, fmt = make_weights()[1:], floating(2, 1)
    rounding = learner(w, fmt, choose_qparams(w, fmt))
    with torch.no_grad():
        rounding.v.copy_(torch.where(rounding.v >= 0, 10.0, -10.0) * rounding.temperature)
    assert rounding_loss(rounding, 2.0) == 0
    assert torch.equal(rounding.soft_weight()[0], rounding.hard_weight())
    with torch.no_grad():
        rounding.v[0] = 0  # h = 1/2, so that each loss is 1
    assert rounding_loss(rounding, 20.0) == pytest.approx(w.shape[1])


def test_the_rounding_loss_follows_the_formula():
    w, fmt = make_weights()[1:], floating(2, 1)
    rounding = adaround(w, fmt, choose_qparams(w, fmt))
    h = (1.2 / (1 + torch.exp(-rounding.v)) - 0.1).clamp(0, 1)
    for beta in (20.0, 2.0):
        torch.testing.assert_close(
            rounding.soft_weight(beta)[1], (1 - (2 * h - 1).abs() ** beta).sum()
        )


@pytest.mark.parametrize("fmt", [floating(2, 1), integer(4, signed=False)], ids=lambda f: f.name)
def test_soft_weights_are_the_published_formulas(fmt: NumberFormat):
    """Floats: clip(s (floor(u) + h)). Integers: d (clip(floor(W/d) + h + zp) - zp), for any V."""
    w = make_weights()[1:]
    qparams = choose_qparams(w, fmt, None)
    rounding = adaround(w, fmt, qparams)
    with torch.no_grad():
        rounding.v.normal_(generator=torch.Generator().manual_seed(2))
    h = (1.2 * torch.sigmoid(rounding.v) - 0.1).clamp(0, 1)
    if fmt.min:
        x = w / qparams.scale
        step = fmt.step(x.abs().clamp(max=fmt.max))
        # Here h goes from the inner to the outer neighbor, and in the paper from below to above.
        up = torch.where(x < 0, 1 - h, h)
        expected = (step * ((x / step).floor() + up)).clamp(fmt.min, fmt.max) * qparams.scale
    else:
        d, zero = qparams.scale, qparams.from_grid(torch.zeros_like(w)) / -qparams.scale
        expected = d * (((w / d).floor() + h + zero.round()).clamp(0, fmt.max) - zero.round())
    inside = (qparams.to_grid(w) > fmt.min) & (qparams.to_grid(w) < fmt.max)
    torch.testing.assert_close(
        rounding.soft_weight()[0][inside], expected[inside], rtol=1e-4, atol=1e-7
    )


def train_with_adam(rounding: AdaRound, x: Tensor, w: Tensor, lr: Tensor, eps: Tensor) -> None:
    """Train for 50 steps of torch's Adam, with an `lr` and an `eps` for each weight."""
    parameters = [nn.Parameter(v.clone()) for v in rounding.v.detach().flatten()]
    per_weight = zip(parameters, lr.flatten().tolist(), eps.flatten().tolist(), strict=True)
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": rate, "eps": e} for p, rate, e in per_weight]
    )
    for step in range(50):
        rounding.zero_grad()
        soft, loss = rounding.soft_weight(20 - step / 3, torch.float64)
        ((x @ (soft - w).T).square().mean() + 1e-4 * loss).backward()
        for p, g in zip(parameters, rounding.v.grad.flatten(), strict=True):
            p.grad = g.clone()
        optimizer.step()
        rounding.v.data.copy_(torch.stack([p.detach() for p in parameters]).view_as(w))


def test_scale_aware_is_adaround_with_a_rate_per_weight():
    """In fp64, both agree to 1e-12 after 50 steps of Adam, whose eps scales with the step."""
    w = make_weights(rows=9)[1:, :8].double()
    x = torch.randn(32, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    qparams = AbsMax()(w, floating(2, 1))
    aware = adaround_scale_aware(w, floating(2, 1), qparams)
    plain = adaround(w, floating(2, 1), qparams)
    start, step = plain.v.detach().clone(), aware.temperature
    assert aware.v.dtype == torch.float64
    assert len(step.unique()) > 8
    lr, eps = torch.full_like(w, 1e-3), torch.full_like(w, 1e-8)
    train_with_adam(aware, x, w, lr, eps)
    train_with_adam(plain, x, w, lr / step, eps * step)
    assert (plain.v - start).abs().max() > 0.5
    torch.testing.assert_close(aware.v / step, plain.v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [2.0**-7, 8.0, 3.0])
def test_normalized_variables_ignore_the_size_of_the_weights(factor: float):
    w, fmt = make_weights()[1:], floating(2, 1)
    small = make_rounding(w, fmt, adaround_scale_aware_normalized)
    large = make_rounding(w * factor, fmt, adaround_scale_aware_normalized)
    torch.testing.assert_close(small.v, large.v, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(small.temperature, large.temperature)
    assert small.temperature.mean().item() == pytest.approx(1)
    raw = make_rounding(w * factor, fmt, adaround_scale_aware)
    torch.testing.assert_close(
        raw.temperature, make_rounding(w, fmt, adaround_scale_aware).temperature * factor
    )


def make_rounding(w: Tensor, fmt: NumberFormat, learner: RoundingFactory) -> AdaRound:
    return learner(w, fmt, choose_qparams(w, fmt, None))


@formats
def test_stochastic_rounding_is_unbiased_and_takes_a_neighbor(fmt: NumberFormat):
    """The mean of 5,000 roundings of each of 20 values lies within 4 standard errors."""
    g, count = torch.Generator().manual_seed(4), 5000
    x = fmt.min + (fmt.max - fmt.min) * torch.rand(20, 1, generator=g)
    inner, outer = fmt.bracket(x)
    rounded = StochasticRounding(seed=1)(x.expand(20, count).contiguous(), fmt)
    assert ((rounded == inner) | (rounded == outer)).all()
    share = (x - inner) / (outer - inner)
    error = (outer - inner).abs() * (share * (1 - share) / count).sqrt()
    assert ((rounded.mean(1, keepdim=True) - x).abs() <= 4 * error + 1e-5 * x.abs()).all()
    assert (rounded.std(1) > 0).any()


@formats
def test_stochastic_rounding_keeps_grid_values_and_clips(fmt: NumberFormat):
    values = fmt.values()
    assert torch.equal(StochasticRounding()(values, fmt), values)
    beyond = torch.linspace(0.01, 0.99, 50)
    assert (StochasticRounding()(fmt.min - beyond, fmt) == fmt.min).all()
    assert (StochasticRounding()(fmt.max + beyond, fmt) == fmt.max).all()


def test_stochastic_rounding_depends_on_seed_and_values_only():
    fmt, a, b = floating(2, 1), make_weights() * 20, make_weights().flip(0) * 20
    rounding = StochasticRounding(3)
    first = rounding(a, fmt)
    rounding(b, fmt)
    assert torch.equal(rounding(a, fmt), first)
    assert torch.equal(StochasticRounding(3)(a, fmt), first)
    assert not torch.equal(StochasticRounding(4)(a, fmt), first)
    same = torch.full((2, 400), 0.6)
    same[1, -1] = 0.7
    up = rounding(same[:1], fmt), rounding(same[1:], fmt)
    assert not torch.equal(up[0], up[1])  # other values have other random numbers
