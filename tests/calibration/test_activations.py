"""Test static scales of activations, their storage, and the measured signal-to-noise ratios."""

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from fp4dit.calibration.activations import (
    ObserveTask,
    ReplayTask,
    load_scales_,
    save_scales,
)
from fp4dit.calibration.measure import MeasureTask, PredictTask
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.qparams import as_tensors
from fp4dit.numerics.quantizer import PerChannel, PerInputChannel, PerTensor, PerToken, Quantizer
from fp4dit.numerics.scale_rules import MinMax
from fp4dit.numerics.scale_search import PreShift
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.observers import (
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    SampleObserver,
)
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.utils.errors import UserError
from tests.calibration.test_propagate import make_call
from tests.helpers import tiny

STATIC = Rule(
    "*", Quantizer(integer(8, signed=False), PerTensor(), MinMax()), observer=SampleObserver(64)
)
DYNAMIC = Rule("*", Quantizer(integer(8), PerToken()))


def quantize_pipeline(
    pipeline: PixArtAdapter, *rules: Rule
) -> tuple[dict[str, FakeQuantize], dict[str, Rule]]:
    quantize_weights_(
        pipeline.transformer,
        assign_rules(find_layers(pipeline.transformer), tiny.rules()),
    )
    return quantize_activations_(pipeline.transformer, rules)


def make_states(pipeline: PixArtAdapter) -> list[dict[str, Tensor]]:
    """Return the inputs of two calls, at timesteps 601 and 42."""
    calls = [make_call(), make_call()]
    calls[1].kwargs["timestep"] = torch.full((5,), 42)
    return [pipeline.initial_state(call) for call in calls]


def run_task(task: ReplayTask, states: list[dict[str, Tensor]]) -> None:
    tiny.trainer()().test(task, tiny.load_one_by_one(states), verbose=False)


def record_inputs(activations: dict[str, FakeQuantize]) -> dict[str, list[Tensor]]:
    """Return lists that the next calls fill with the inputs of each quantizer."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in activations}

    def hook(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[name].append(args[0].flatten())

    for name, module in activations.items():
        module.register_forward_pre_hook(partial(hook, name))
    return inputs


def test_a_sample_holds_the_extremes():
    x = torch.randn(10, 1000)
    x[3, 7], x[5, 9] = -99, 77
    values = SampleObserver(100).summarize(x)
    assert (values.min(), values.max()) == (-99, 77)
    assert 100 <= len(values) <= 202
    assert len(SampleObserver(100).summarize(x[0, :3])) == 5


def test_static_ranges_cover_the_observed_values(pipeline: PixArtAdapter):
    activations, rules = quantize_pipeline(pipeline, STATIC)
    inputs_by_name = record_inputs(activations)
    observe = ObserveTask(pipeline, activations, rules)
    run_task(observe, make_states(pipeline))
    observe.calibrate()
    for name, module in activations.items():
        x, fmt = torch.cat(inputs_by_name[name]), module.quantizer.format
        grid = module.qparams.to_grid(x[None])
        assert grid.min() >= fmt.min - 0.501, name
        assert grid.max() <= fmt.max + 0.501, name
        # A range always contains zero, and so may be larger than that of the values.
        assert grid.max() - grid.min() >= (fmt.max - fmt.min) * 0.49


@pytest.mark.parametrize("rule", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_an_activation_that_is_never_read_is_an_error(pipeline: PixArtAdapter, rule: Rule):
    """Some attention processors do not call `scaled_dot_product_attention`."""
    for block in pipeline.transformer.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    activations, rules = quantize_pipeline(pipeline, rule)
    task = (
        ObserveTask(pipeline, activations, rules)
        if rule.observer
        else MeasureTask(pipeline, activations)
    )
    run_task(task, make_states(pipeline))
    operands = ", ".join(rf"transformer_blocks\.0\.attn1\.{operand}" for operand in "qkv")
    option = r"\+activation\.ignore=\['transformer_blocks\.0\.attn1\.q'\]"
    with pytest.raises(UserError, match=rf"^{operands} and 3 more would .* {option}"):
        task.calibrate() if isinstance(task, ObserveTask) else task.audit_activations(rules)


def test_observing_sees_unquantized_activations(pipeline: PixArtAdapter):
    """A layer reads the outputs of the layers before it in full precision."""
    plain, _ = quantize_pipeline(pipeline, DYNAMIC)
    for module in plain.values():
        module.quantizer = Quantizer(integer(16), PerChannel())
    coarse = Rule(
        "*",
        Quantizer(integer(2, signed=False), PerTensor(), MinMax()),
        observer=SampleObserver(64),
    )
    expected = record_inputs(plain)
    run_task(MeasureTask(pipeline, plain), make_states(pipeline))
    activations, _ = quantize_activations_(pipeline.transformer, [coarse])
    inputs_by_name = record_inputs(activations)
    run_task(
        ObserveTask(pipeline, activations, dict.fromkeys(activations, coarse)),
        make_states(pipeline),
    )
    for name in activations:
        torch.testing.assert_close(
            torch.cat(inputs_by_name[name]), torch.cat(expected[name]), rtol=2e-2, atol=2e-2
        )


def test_sqnr_of_a_uniform_quantizer_is_near_its_closed_form(pipeline: PixArtAdapter):
    """The values are uniform in [0, 1], with power 1/3. The noise is step^2 / 12."""
    activation = FakeQuantize(Quantizer(integer(8, signed=False), PerTensor(), MinMax()))
    measure = MeasureTask(pipeline, {"a": activation})
    for seed, timestep in enumerate([900.0, 900.0, 100.0]):
        x = torch.rand(200, 500, generator=torch.Generator().manual_seed(seed))
        measure.on_activation("a", timestep, x, activation(x))
    sqnr = {row["timestep"]: row["sqnr_db"] for row in measure.compute_sqnr()}
    expected = 10 * math.log10((1 / 3) / (1 / 255**2 / 12))
    assert sqnr.keys() == {900.0, 100.0}
    assert sqnr[900.0] == pytest.approx(expected, abs=0.1)
    assert sqnr[100.0] == pytest.approx(expected, abs=0.1)


def test_every_activation_is_measured_at_every_timestep(pipeline: PixArtAdapter):
    activations, rules = quantize_pipeline(pipeline, DYNAMIC)
    measure = MeasureTask(pipeline, activations)
    run_task(measure, make_states(pipeline))
    rows = measure.compute_sqnr()
    actual = {(row["layer"], row["timestep"]) for row in rows}
    assert actual == set(itertools.product(activations, (601.0, 42.0)))
    assert all(25 < row["sqnr_db"] < 80 for row in rows)
    audit = {entry.name: entry for entry in measure.audit_activations(rules)}
    query = audit["transformer_blocks.0.attn1.q"]
    assert (query.bits, query.values) == (8 + 32 / 16, 5 * 2 * 16 * 16)
    assert audit["transformer_blocks.0.ff.net.0.proj"].bits == 8 + 32 / 32


@pytest.mark.parametrize("num_values", [65536, 100])
def test_the_error_of_calls_is_that_of_the_predicted_noise(
    pipeline: PixArtAdapter, num_values: int
):
    """The transformer also predicts a variance, which no sampler reads."""
    calls, states = [make_call(), make_call()], make_states(pipeline)
    calls[1].kwargs["timestep"] = torch.full((5,), 42)
    noise = slice(pipeline.transformer.config.in_channels)
    with torch.no_grad():
        expected = torch.cat([call(pipeline.transformer)[0][:, noise] for call in calls])
        predict = PredictTask(pipeline, num_values)
        run_task(predict, states)
        activations, _ = quantize_pipeline(pipeline, DYNAMIC)
        measure = MeasureTask(pipeline, activations, predict.predictions)
        run_task(measure, states)
        actual = torch.cat([call(pipeline.transformer)[0][:, noise] for call in calls])
    assert max(x.shape[1] for x in predict.predictions) <= num_values
    error = (actual - expected).square().sum() / expected.square().sum()
    accuracy = 1e-4 if num_values > expected[0].numel() else 0.5
    assert 1e-6 < measure.compute_call_error() == pytest.approx(error.item(), rel=accuracy)


def test_loaded_scales_are_the_saved_ones(pipeline: PixArtAdapter, tmp_path: Path):
    rules = [Rule("*.attn1.?", DYNAMIC.quantizer), STATIC]
    activations, assigned = quantize_pipeline(pipeline, *rules)
    observed = {name: rule for name, rule in assigned.items() if rule.observer}
    observe = ObserveTask(pipeline, activations, observed)
    run_task(observe, make_states(pipeline))
    observe.calibrate()
    save_scales(activations, tmp_path / "scales.safetensors")
    call = make_call()
    with torch.no_grad():
        expected = call(pipeline.transformer)[0]
    before = {name: module.qparams for name, module in activations.items()}
    again, _ = quantize_activations_(pipeline.transformer, rules)
    load_scales_(again, tmp_path / "scales.safetensors")
    for name, module in again.items():
        assert (module.qparams is None) == (before[name] is None) == (name not in observed)
        if module.qparams is not None:
            for key, tensor in as_tensors(module.qparams).items():
                assert torch.equal(tensor, as_tensors(before[name])[key])
    with torch.no_grad():
        assert torch.equal(call(pipeline.transformer)[0], expected)


FP8 = FormatSelection([floating(3, 4), floating(4, 3), floating(5, 2)], LeastError())
PER_TIMESTEP = Rule("*", STATIC.quantizer, observer=SampleObserver(10**6), per_timestep=True)
RULES = {
    "per timestep": PER_TIMESTEP,
    "selected format": Rule("*", Quantizer(FP8, PerTensor()), observer=SampleObserver(64)),
    "selected format per timestep": Rule(
        "*", Quantizer(FP8, PerTensor()), observer=SampleObserver(64), per_timestep=True
    ),
    "shifted": Rule(
        "*", Quantizer(FP8, PerInputChannel(), PreShift(3)), observer=PerChannelMinMaxObserver()
    ),
    "moving": Rule("*", STATIC.quantizer, observer=MovingAverageMinMaxObserver(0.5)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_all_kinds_of_scales_load_into_a_new_model(
    pipeline: PixArtAdapter, tmp_path: Path, rule: Rule
):
    activations, rules = quantize_pipeline(pipeline, rule)
    observe = ObserveTask(pipeline, activations, rules)
    run_task(observe, make_states(pipeline))
    observe.calibrate()
    save_scales(activations, tmp_path / "scales.safetensors")
    first = make_call()
    with torch.no_grad():
        expected = first(pipeline.transformer)[0]
        again, _ = quantize_activations_(pipeline.transformer, [rule])
        uncalibrated = first(pipeline.transformer)[0]
        load_scales_(again, tmp_path / "scales.safetensors")
        assert torch.equal(first(pipeline.transformer)[0], expected)
    error = (expected - uncalibrated).square().mean() / uncalibrated.square().mean()
    assert 0 < error < 0.05
    for name, fake_quant in activations.items():
        assert again[name].format.name == fake_quant.format.name


def test_scales_per_timestep_are_those_of_the_nearest_timestep(pipeline: PixArtAdapter):
    """The expected scales come from inputs that a hook of this test records."""
    activations, rules = quantize_pipeline(pipeline, PER_TIMESTEP)
    inputs_by_name = record_inputs(activations)
    observe = ObserveTask(pipeline, activations, rules)
    run_task(observe, make_states(pipeline))
    observe.calibrate()
    timesteps = [601.0, 42.0]
    inputs: dict[tuple[str, float], Tensor] = {}
    for name, fake_quant in activations.items():
        assert isinstance(fake_quant, TimestepFakeQuantize)
        assert fake_quant.state_dict()["timesteps"].tolist() == timesteps
        halves = torch.cat(inputs_by_name[name]).chunk(2)
        for timestep, x in zip(timesteps, halves, strict=True):
            inputs[name, timestep] = x
    name = "transformer_blocks.0.attn1.to_q"  # after adaLN, whose shift depends on the timestep
    assert len(activations[name].state_dict()["scale"].unique()) == 2
    for timestep in (601, 600, 300, 1):
        call = make_call()
        call.kwargs["timestep"] = torch.full((5,), timestep)
        with torch.no_grad():
            call(pipeline.transformer)
        nearest = min(timesteps, key=lambda t: abs(t - timestep))
        for name, fake_quant in activations.items():
            qparams = MinMax()(inputs[name, nearest][None], integer(8, signed=False))
            assert torch.equal(fake_quant.qparams.scale, qparams.scale), (name, timestep)
            assert torch.equal(fake_quant.qparams.zero, qparams.zero)


def test_a_static_activation_without_a_stored_scale_is_an_error(
    pipeline: PixArtAdapter, tmp_path: Path
):
    activations, _ = quantize_pipeline(pipeline, STATIC)
    save_scales(activations, tmp_path / "scales.safetensors")
    with pytest.raises(UserError, match="holds no scale for the static activation"):
        load_scales_(activations, tmp_path / "scales.safetensors")
