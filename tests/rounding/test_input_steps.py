"""Test the learning of static inputs' steps: gradients by others' formulas, and stages."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.qparams import Affine, Scale
from fp4dit.numerics.quantizer import PerInputChannel, PerTensor, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.numerics.scale_search import PartScales
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer, make_quant_layer
from fp4dit.rounding.adaround import adaround
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.input_steps import FixedWeight, InputSteps, LearnedStep
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.rounding.staged import StagedReconstruction
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers
from tests.helpers import tiny
from tests.rounding.test_reconstruction import make_linear_unit

INT4 = integer(4, signed=False)
STATIC = Quantizer(INT4, PerTensor(), MinMax())


def make_inputs() -> Tensor:
    return torch.randn(6, 7, 32, generator=torch.Generator().manual_seed(2)) + 0.4


def quantize_as_ptq4dit(x: Tensor, delta: Tensor, zero: float, levels: int) -> Tensor:
    """The formula of PTQ4DiT and Q-Diffusion: round_ste(x / delta) + zero, clamped."""
    divided = x / delta
    rounded = divided + (divided.round() - divided).detach()
    return ((rounded + zero).clamp(0, levels - 1) - zero) * delta


def test_the_gradient_of_an_integer_step_is_that_of_the_authors_formula():
    x, delta, zero = make_inputs(), torch.tensor(0.21, requires_grad=True), 5.0
    outer = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    expected = quantize_as_ptq4dit(x, delta, zero, 16)
    (expected * outer).sum().backward()
    step = LearnedStep(INT4, PerTensor(), Affine(torch.tensor([[0.21]]), torch.tensor([[zero]])))
    values = step(x)
    (values * outer).sum().backward()
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(step.scale.grad.squeeze(), delta.grad)  # pyright: ignore
    assert (values == values.max()).sum() > 20  # some values are clipped


def test_the_gradient_of_a_float_step_is_that_of_lsq():
    """Equation 3 of LSQ, with an end that reaches half a step further, as in Q-Diffusion."""
    x, scale, fmt = make_inputs(), torch.tensor([[0.35]]), floating(2, 1)
    step = LearnedStep(fmt, PerTensor(), Scale(scale))
    [gradient] = torch.autograd.grad(step(x).sum(), step.scale)
    v = x / scale
    inside = fmt.nearest(v) - v
    expected = torch.where(v.abs() < fmt.max + 1, inside, v.sign() * fmt.max)
    torch.testing.assert_close(gradient.squeeze(), expected.sum(), rtol=1e-4, atol=1e-4)


def test_a_step_begins_as_calibrated_and_stays_positive():
    x, fake_quant = make_inputs(), FakeQuantize(STATIC, static=True)
    fake_quant.calibrate(x)
    step = LearnedStep(INT4, PerTensor(), fake_quant.qparams)  # pyright: ignore
    assert torch.equal(step(x.bfloat16()), fake_quant(x.bfloat16()))
    with torch.no_grad():
        step.scale.fill_(-1.0)
    assert (step.qparams.scale > 0).all()  # pyright: ignore
    (step(x) + step(2 * x)).sum().backward()  # a layer may be called several times
    assert step.scale.grad.isfinite().all()  # pyright: ignore


def test_two_halves_learn_two_steps():
    quantizer = Quantizer(INT4, PerInputChannel(), PartScales(MinMax()))
    x = make_inputs() * torch.tensor([1.0] * 16 + [5.0] * 16)
    qparams = quantizer.compute_qparams(x)
    step = LearnedStep(INT4, PerInputChannel(), qparams)
    assert torch.equal(step(x), quantizer(x, qparams))
    step(x).square().sum().backward()
    for half, columns in enumerate((slice(0, 16), slice(16, 32))):
        alone = Affine(qparams.scale[:, columns][:, :1], qparams.zero[:, columns][:, :1])  # pyright: ignore
        single = LearnedStep(INT4, PerTensor(), alone)
        single(x[..., columns]).square().sum().backward()
        torch.testing.assert_close(  # the sums have other orders
            step.scale.grad[half],  # pyright: ignore
            single.scale.grad[0],  # pyright: ignore
            rtol=1e-4,
            atol=1e-4,
        )


def make_static_layer() -> tuple[QuantLayer, UnitDataset]:
    """Return a layer with a step of its input four times too long, and its data."""
    unit, state, linear = make_linear_unit()
    dataset = UnitDataset(unit, state, {"y": linear(state["x"])}, torch.arange(128))
    layer = make_quant_layer(linear, tiny.rules()[1].quantizer)  # pyright: ignore
    layer.input_fake_quant = FakeQuantize(STATIC, static=True)
    layer.prepare(4 * state["x"])
    return layer, dataset


def compute_error(layer: QuantLayer, dataset: UnitDataset) -> float:
    x, y = dataset.inputs["x"][128:], dataset.targets["y"][128:]
    return (layer(x) - y).square().mean().item()


def round_layer(
    method: RoundingMethod, trainers: ResumableTrainers | None = None
) -> tuple[QuantLayer, float]:
    layer, dataset = make_static_layer()
    method.round_unit(layer, [layer], dataset, trainers or tiny.trainer())
    assert isinstance(layer.input_fake_quant, FakeQuantize)
    return layer, compute_error(layer, dataset)


STEPS = tiny.learned_rounding(
    FixedWeight, steps=60, objective=RelativeMSE(0.0), inputs=InputSteps(lr=0.1)
)


def test_steps_are_learned_with_the_roundings():
    method = tiny.learned_rounding(adaround, steps=60, lr=0.05, objective=RelativeMSE(10.0))
    _, without = round_layer(method)
    layer, error = round_layer(replace(method, inputs=InputSteps(lr=0.1)))
    assert error < 0.6 * without
    start, _ = make_static_layer()
    before, after = start.input_fake_quant.qparams, layer.input_fake_quant.qparams
    assert after.scale < before.scale  # pyright: ignore
    assert torch.equal(after.zero, before.zero)  # pyright: ignore


def test_the_second_stage_changes_no_weight():
    """The first stage sees 16-bit inputs, so that its weights are those without a quantizer."""
    weights = tiny.learned_rounding(adaround, steps=20, lr=0.05)
    plain, dataset = make_static_layer()
    quantizer, plain.input_fake_quant = plain.input_fake_quant, torch.nn.Identity()
    weights.round_unit(plain, [plain], dataset, tiny.trainer())
    plain.input_fake_quant = quantizer
    layer, error = round_layer(StagedReconstruction(weights, STEPS))
    assert torch.equal(layer.weight, plain.weight)
    assert error < 0.6 * compute_error(plain, dataset)


def test_a_killed_second_stage_goes_on_with_the_saved_weights(tmp_path: Path):
    class Killed(Exception):
        pass

    class DyingMSE(RelativeMSE):
        def error(self, output: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> Tensor:
            raise Killed

    method = StagedReconstruction(tiny.learned_rounding(adaround, steps=20, lr=0.05), STEPS)
    trainers = ResumableTrainers(tiny.trainer().make, tmp_path, seconds=0.0)
    with pytest.raises(Killed):
        round_layer(replace(method, inputs=replace(STEPS, objective=DyingMSE())), trainers)
    resumed, _ = round_layer(replace(method, weights=RoundToNearest()), trainers)
    expected, _ = round_layer(method)
    assert torch.equal(resumed.weight, expected.weight)
    assert resumed.input_fake_quant.qparams == expected.input_fake_quant.qparams


def test_the_steps_alone_decay():
    optimizer = STEPS.optimizer(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)], "lr": 0.4}]
    )
    schedule = InputSteps(lr=0.4).make_schedule(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    expected = cosine(torch.optim.SGD([torch.zeros(1)], lr=0.4), 10)
    for first, second in rates:
        assert first == 1e-2
        assert second == pytest.approx(expected.get_last_lr()[0])
        expected.optimizer.step()
        expected.step()


@pytest.mark.parametrize("inputs", [None, Quantizer(INT4, PerToken(), AbsMax())])
def test_steps_of_inputs_that_have_none_are_refused(inputs: Quantizer | None):
    layer, _ = make_static_layer()
    layer.input_fake_quant = FakeQuantize(inputs) if inputs else torch.nn.Identity()
    with pytest.raises(UserError, match="no input has a static scale"):
        replace(STEPS, learner=partial(adaround)).check([layer])
