"""Static ranges, measured signal-to-noise, and their storage."""

import math
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from fp4dit import policy
from fp4dit.choice import Choice, LeastError
from fp4dit.errors import UserError
from fp4dit.formats import floating, integer
from fp4dit.grid import Grid, TimedGrid
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.observers import ChannelRange, MovingRange, Sample
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import MinMax, PreShift
from fp4dit.scaling import parts
from fp4dit.tasks.activate import Measure, Observe, load_scales_, save_scales
from tests import tiny
from tests.test_stream import call

STATIC = Rule("*", Quantizer(integer(8, signed=False), Granularity("tensor"), MinMax()), observe=Sample(64))
ONLINE = Rule("*", Quantizer(integer(8), Granularity("row")))


def quantized(pipeline: PixArtPipeline, *rules: Rule) -> tuple[dict[str, Grid], dict[str, Rule]]:
    policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    return policy.quantize_activations_(pipeline.dit, rules)


def states(pipeline: PixArtPipeline) -> list[dict[str, Tensor]]:
    given = [call(), call()]
    given[1].kwargs["timestep"] = torch.full((5,), 42)
    return [pipeline.begin(c) for c in given]


def run(task: Observe | Measure, given: list[dict[str, Tensor]]) -> None:
    tiny.trainer()().test(task, tiny.one_by_one(given), verbose=False)


def watch(activations: dict[str, Grid]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in activations}
    for name, module in activations.items():
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten()))
    return seen


def test_a_sample_holds_the_extremes():
    x = torch.randn(10, 1000)
    x[3, 7], x[5, 9] = -99, 77
    values = Sample(100).note(x)
    assert (values.min(), values.max()) == (-99, 77)
    assert 100 <= len(values) <= 202
    assert len(Sample(100).note(x[0, :3])) == 5


def test_static_ranges_cover_what_was_observed(pipeline: PixArtPipeline):
    activations, rules = quantized(pipeline, STATIC)
    seen = watch(activations)
    observe = Observe(pipeline, activations, rules)
    run(observe, states(pipeline))
    observe.fix()
    for name, module in activations.items():
        x, fmt = torch.cat(seen[name]), module.quantizer.format
        grid = module.scaling.to_grid(x[None])
        assert grid.min() >= fmt.min - 0.501, name
        assert grid.max() <= fmt.max + 0.501, name
        assert grid.max() - grid.min() >= (fmt.max - fmt.min) * 0.49  # zero may lie outside the values' own range


@pytest.mark.parametrize("rule", [STATIC, ONLINE], ids=["static", "online"])
def test_what_the_model_never_reads_is_named(pipeline: PixArtPipeline, rule: Rule):
    """Such as operands of an attention that multiplies by itself; here, one of diffusers' older ones."""
    for block in pipeline.dit.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    activations, rules = quantized(pipeline, rule)
    task = Observe(pipeline, activations, rules) if rule.observe else Measure(pipeline, activations)
    run(task, states(pipeline))
    operands = ", ".join(rf"transformer_blocks\.0\.attn1\.{operand}" for operand in "qkv")
    with pytest.raises(
        UserError, match=rf"^{operands} and 3 more would .* \+activation\.leave=\['transformer_blocks\.0\.attn1\.q'\]"
    ):
        task.fix() if isinstance(task, Observe) else task.audit(rules)


def test_observing_sees_unquantized_activations(pipeline: PixArtPipeline):
    """The patch embedding's answer is full precision for whoever comes next, or ranges would be of noise."""
    plain, _ = quantized(pipeline, ONLINE)
    for module in plain.values():
        module.quantizer = Quantizer(integer(16), Granularity("row"))
    coarse = Rule("*", Quantizer(integer(2, signed=False), Granularity("tensor"), MinMax()), observe=Sample(64))
    fine_seen = watch(plain)
    run(Measure(pipeline, plain), states(pipeline))
    activations, _ = policy.quantize_activations_(pipeline.dit, [coarse])
    seen = watch(activations)
    run(Observe(pipeline, activations, dict.fromkeys(activations, coarse)), states(pipeline))
    for name in activations:
        torch.testing.assert_close(torch.cat(seen[name]), torch.cat(fine_seen[name]), rtol=2e-2, atol=2e-2)


def test_sqnr_of_a_uniform_quantizer_is_near_its_closed_form(pipeline: PixArtPipeline):
    """Uniform data over [0, 1]: signal 1/3, noise a step squared / 12."""
    activation = Grid(Quantizer(integer(8, signed=False), Granularity("tensor"), MinMax()))
    measure = Measure(pipeline, {"a": activation})
    for seed, timestep in enumerate([900.0, 900.0, 100.0]):
        x = torch.rand(200, 500, generator=torch.Generator().manual_seed(seed))
        measure.see("a", timestep, x, activation(x))
    found = {row["timestep"]: row["sqnr_db"] for row in measure.sqnr()}
    expected = 10 * math.log10((1 / 3) / (1 / 255**2 / 12))
    assert found.keys() == {900.0, 100.0}
    assert found[900.0] == pytest.approx(expected, abs=0.1)
    assert found[100.0] == pytest.approx(expected, abs=0.1)


def test_every_activation_is_measured_at_every_timestep(pipeline: PixArtPipeline):
    activations, rules = quantized(pipeline, ONLINE)
    measure = Measure(pipeline, activations)
    run(measure, states(pipeline))
    found = measure.sqnr()
    assert {(row["layer"], row["timestep"]) for row in found} == {(n, t) for n in activations for t in (601.0, 42.0)}
    assert all(25 < row["sqnr_db"] < 80 for row in found)
    audit = {entry.name: entry for entry in measure.audit(rules)}
    query = audit["transformer_blocks.0.attn1.q"]
    assert (query.bits, query.values) == (8 + 32 / 16, 5 * 2 * 16 * 16)
    assert audit["transformer_blocks.0.ff.net.0.proj"].bits == 8 + 32 / 32


def test_saved_and_loaded_scalings_are_identical(pipeline: PixArtPipeline, tmp_path: Path):
    rules = [Rule("*.attn1.?", ONLINE.quantizer), STATIC]
    activations, chosen = quantized(pipeline, *rules)
    observed = {name: rule for name, rule in chosen.items() if rule.observe}
    observe = Observe(pipeline, activations, observed)
    run(observe, states(pipeline))
    observe.fix()
    save_scales(activations, tmp_path / "scales.safetensors")
    given = call()
    with torch.no_grad():
        expected = given(pipeline.dit)[0]
    before = {name: module.scaling for name, module in activations.items()}
    again, _ = policy.quantize_activations_(pipeline.dit, rules)
    load_scales_(again, tmp_path / "scales.safetensors")
    for name, module in again.items():
        assert (module.scaling is None) == (before[name] is None) == (name not in observed)
        if module.scaling is not None:
            assert all(torch.equal(a, parts(before[name])[part]) for part, a in parts(module.scaling).items())
    with torch.no_grad():
        assert torch.equal(given(pipeline.dit)[0], expected)


FP8 = Choice([floating(3, 4), floating(4, 3), floating(5, 2)], LeastError())
TIMED = Rule("*", STATIC.quantizer, observe=Sample(10**6), timed=True)
RULES = {
    "timed": TIMED,
    "chosen": Rule("*", Quantizer(FP8, Granularity("tensor")), observe=Sample(64)),
    "timed and chosen": Rule("*", Quantizer(FP8, Granularity("tensor")), observe=Sample(64), timed=True),
    "shifted": Rule("*", Quantizer(FP8, Granularity("channel"), PreShift(3)), observe=ChannelRange()),
    "moving": Rule("*", STATIC.quantizer, observe=MovingRange(0.5)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_whatever_was_observed_comes_back_in_a_fresh_model(pipeline: PixArtPipeline, tmp_path: Path, rule: Rule):
    activations, rules = quantized(pipeline, rule)
    observe = Observe(pipeline, activations, rules)
    run(observe, states(pipeline))
    observe.fix()
    save_scales(activations, tmp_path / "scales.safetensors")
    first = call()
    with torch.no_grad():
        expected = first(pipeline.dit)[0]
        again, _ = policy.quantize_activations_(pipeline.dit, [rule])
        unmeasured = first(pipeline.dit)[0]
        load_scales_(again, tmp_path / "scales.safetensors")
        assert torch.equal(first(pipeline.dit)[0], expected)
    error = (expected - unmeasured).square().mean() / unmeasured.square().mean()
    assert 0 < error < 0.05
    assert all(again[name].format.name == grid.format.name for name, grid in activations.items())


def test_timed_grids_take_the_range_of_their_own_timestep(pipeline: PixArtPipeline):
    """As seen by a hand-made hook, at both timesteps; the model's own calls set the clock."""
    activations, rules = quantized(pipeline, TIMED)
    seen = watch(activations)
    observe = Observe(pipeline, activations, rules)
    run(observe, states(pipeline))
    observe.fix()
    timesteps = [601.0, 42.0]
    entered: dict[tuple[str, float], Tensor] = {}
    for name, grid in activations.items():
        assert isinstance(grid, TimedGrid)
        assert grid.state_dict()["timesteps"].tolist() == timesteps
        halves = torch.cat(seen[name]).chunk(2)
        for timestep, x in zip(timesteps, halves, strict=True):
            entered[name, timestep] = x
    name = "transformer_blocks.0.attn1.to_q"  # behind adaLN, which the timestep moves
    assert len(activations[name].state_dict()["scale"].unique()) == 2
    for timestep in (601, 600, 300, 1):
        given = call()
        given.kwargs["timestep"] = torch.full((5,), timestep)
        with torch.no_grad():
            given(pipeline.dit)
        nearest = min(timesteps, key=lambda t: abs(t - timestep))
        for name, grid in activations.items():
            scaling = MinMax()(entered[name, nearest][None], integer(8, signed=False))
            assert torch.equal(grid.scaling.scale, scaling.scale), (name, timestep)
            assert torch.equal(grid.scaling.zero, scaling.zero)


def test_a_static_activation_without_a_stored_scale_is_an_error(pipeline: PixArtPipeline, tmp_path: Path):
    activations, _ = quantized(pipeline, STATIC)
    save_scales(activations, tmp_path / "scales.safetensors")
    with pytest.raises(UserError, match="holds no scale for the static activation"):
        load_scales_(activations, tmp_path / "scales.safetensors")
