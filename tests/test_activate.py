"""Static ranges, measured signal-to-noise, and their storage."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp4dit import policy
from fp4dit.formats import integer
from fp4dit.layer import Activation
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import MinMax, parts
from fp4dit.tasks.activate import Measure, Observe, load_scales_, sample, save_scales
from tests import tiny
from tests.test_stream import call

STATIC = Rule("*", Quantizer(integer(8, signed=False), Granularity("tensor"), MinMax()), observe=64)
ONLINE = Rule("*", Quantizer(integer(8), Granularity("row")))


def quantized(pipeline: PixArtPipeline, *rules: Rule) -> tuple[dict[str, Activation], dict[str, Rule]]:
    policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    return policy.quantize_activations_(pipeline.dit, rules)


def states(pipeline: PixArtPipeline) -> list[dict[str, Tensor]]:
    given = [call(), call()]
    given[1].kwargs["timestep"] = torch.full((5,), 42)
    return [pipeline.begin(c) for c in given]


def run(task: Observe | Measure, given: list[dict[str, Tensor]]) -> None:
    tiny.trainer()().test(task, tiny.one_by_one(given), verbose=False)


def watch(activations: dict[str, Activation]) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in activations}
    for name, module in activations.items():
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten()))
    return seen


def test_a_sample_holds_the_extremes():
    x = torch.randn(10, 1000)
    x[3, 7], x[5, 9] = -99, 77
    values = sample(x, 100)
    assert (values.min(), values.max()) == (-99, 77)
    assert 100 <= len(values) <= 202
    assert len(sample(x[0, :3], 100)) == 5


def test_static_ranges_cover_what_was_observed(pipeline: PixArtPipeline):
    activations, rules = quantized(pipeline, STATIC)
    seen = watch(activations)
    observe = Observe(pipeline, activations, {name: rule.observe for name, rule in rules.items()})
    run(observe, states(pipeline))
    observe.fix()
    for name, module in activations.items():
        x, fmt = torch.cat(seen[name]), module.quantizer.format
        grid = module.scaling.to_grid(x[None])
        assert grid.min() >= fmt.min - 0.501, name
        assert grid.max() <= fmt.max + 0.501, name
        assert grid.max() - grid.min() >= (fmt.max - fmt.min) * 0.49  # zero may lie outside the values' own range


def test_observing_sees_unquantized_activations(pipeline: PixArtPipeline):
    """The patch embedding's answer is full precision for whoever comes next, or ranges would be of noise."""
    plain, _ = quantized(pipeline, ONLINE)
    for module in plain.values():
        module.quantizer = Quantizer(integer(16), Granularity("row"))
    coarse = Rule("*", Quantizer(integer(2, signed=False), Granularity("tensor"), MinMax()), observe=64)
    fine_seen = watch(plain)
    run(Measure(pipeline, plain), states(pipeline))
    activations, _ = policy.quantize_activations_(pipeline.dit, [coarse])
    seen = watch(activations)
    run(Observe(pipeline, activations, dict.fromkeys(activations, 64)), states(pipeline))
    for name in activations:
        torch.testing.assert_close(torch.cat(seen[name]), torch.cat(fine_seen[name]), rtol=2e-2, atol=2e-2)


def test_sqnr_of_a_uniform_quantizer_is_near_its_closed_form(pipeline: PixArtPipeline):
    """Uniform data over [0, 1]: signal 1/3, noise a step squared / 12."""
    activation = Activation(Quantizer(integer(8, signed=False), Granularity("tensor"), MinMax()))
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
    observed = {name: rule.observe for name, rule in chosen.items() if rule.observe}
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
