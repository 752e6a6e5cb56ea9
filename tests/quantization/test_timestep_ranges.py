"""Layers that are others in each range of timesteps."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fp4dit.calibration.capture import CaptureTask, batch_prompts
from fp4dit.calibration.captured_calls import load_calls, load_steps, split_rows
from fp4dit.calibration.measure import MeasureTask
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.quantization.audit import audit_weights
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, find_rule
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.quantization.timestep_ranges import (
    TimestepRangeLinear,
    base_layer_name,
    named_quant_layers,
    rows_per_range,
)
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.rounding.unit_files import load_weights_
from fp4dit.transforms.smoothing import Smoothing
from fp4dit.utils.errors import UserError
from tests.helpers import tiny

FOUR, FINE = (Quantizer(integer(bits), PerChannel()) for bits in (4, 16))


def make_three_ranges() -> TimestepRangeLinear:
    torch.manual_seed(0)
    layers = [make_quant_layer(nn.Linear(8, 4), FOUR) for _ in range(3)]
    return TimestepRangeLinear(layers, [100.0, 500.0], TimestepContext())


def test_each_row_goes_through_the_layer_of_its_time():
    ranges, x = make_three_ranges(), torch.randn(6, 5, 8)
    ranges.context.update(torch.tensor([700.0, 100.0, 101.0, 0.0, 500.0, 999.0]))
    answer = ranges(x)
    for row, layer in enumerate([2, 0, 1, 0, 1, 2]):
        torch.testing.assert_close(answer[row], ranges.layers[layer](x[row : row + 1])[0])
    for now, layer in ((300, 1), (900, 2)):
        ranges.context.update(torch.tensor(now))  # one number for all rows
        assert torch.equal(ranges(x), ranges.layers[layer](x))


def test_shares_tell_the_rows_of_each_range():
    ranges, timestep = make_three_ranges(), torch.tensor([700.0, 100.0, 101.0, 0.0])
    assert [its.tolist() for _, its in rows_per_range(ranges, timestep)] == [
        [False, True, False, True],
        [False, False, True, False],
        [True, False, False, False],
    ]
    assert [its.tolist() for _, its in rows_per_range(ranges.layers[0], timestep)] == [[True] * 4]
    with pytest.raises(
        UserError, match=r"no calibration call is in range 1 of 3 .* reach from 300 to 700"
    ):
        list(rows_per_range(ranges, torch.tensor([300.0, 700.0])))


def test_names_of_ranges_lead_back_to_the_layer_and_its_rule():
    layers = dict(named_quant_layers("a.b", make_three_ranges()))
    assert list(layers) == ["a.b.ranges.0", "a.b.ranges.1", "a.b.ranges.2"]
    assert {base_layer_name(name) for name in layers} == {"a.b"}
    assert find_rule("a.b.ranges.1", [Rule("a.b", FOUR)])


def test_a_model_with_ranges_is_reconstructed_and_comes_back(
    pipeline: PixArtAdapter, loaded: PixArtAdapter, tmp_path: Path
):
    """Each range smooths by its own inputs, counts as a copy, and follows the sampler."""
    task = CaptureTask(pipeline, tmp_path, steps=4, guidance=4.5)
    tiny.trainer()().predict(task, tiny.load_one_by_one(batch_prompts(tiny.PROMPTS, 2, seed=5)))
    rules, plain = (
        tiny.rules_for(
            FINE,
            per_channel_layers=["pos_embed.proj"],
            transforms=[Smoothing()],
            timestep_boundaries=ends,
        )
        for ends in ([500.0], [])
    )
    ours, theirs = (
        audit_weights(pipeline.transformer, weight_rules) for weight_rules in (rules, plain)
    )
    assert [a.bits / b.bits for a, b in zip(ours, theirs, strict=True)] == [1.0] + [2.0] * (
        len(ours) - 1
    )

    state, assigned, out = (
        load_calls(tmp_path),
        assign_rules(find_layers(pipeline.transformer), rules),
        tmp_path / "units",
    )
    out.mkdir()
    reports = Reconstruction(
        pipeline, assigned, RoundToNearest(), *split_rows(state, 3), 8, out
    ).run(state, tiny.trainer)
    assert max(report["error"] for report in reports) < 1e-6
    layer = pipeline.transformer.get_submodule("transformer_blocks.0.ff.net.0.proj")
    assert isinstance(layer, TimestepRangeLinear)
    early, late = (part.transforms[0].divisor for part in layer.layers)
    assert not torch.equal(early, late)

    replayed = copy.deepcopy(loaded)
    activations, _ = load_weights_(replayed, rules, [Rule("*.proj", FOUR)], out)
    measure = MeasureTask(replayed, activations)
    tiny.trainer()().test(measure, tiny.load_one_by_one(load_steps(tmp_path, 3)[1]), verbose=False)
    seen = {
        (row["layer"].rpartition(".")[2], float(row["timestep"]) > 500)
        for row in measure.compute_sqnr()
    }
    assert seen & {("0", True), ("0", False), ("1", True), ("1", False)} == {
        ("0", False),
        ("1", True),
    }

    fresh = copy.deepcopy(loaded)
    load_weights_(fresh, rules, [], out)
    for a, b in zip(
        pipeline.transformer.state_dict().values(),
        fresh.transformer.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    images = [drawer.sample(tiny.PROMPTS[:2], [7, 8], 4, 4.5) for drawer in (loaded, fresh)]
    torch.testing.assert_close(*images, rtol=0, atol=2e-3)
    with torch.no_grad():
        fresh.transformer.get_submodule("proj_out").ranges[
            1
        ].source.weight.zero_()  # of the first two steps
    assert (fresh.sample(tiny.PROMPTS[:2], [7, 8], 4, 4.5) - images[0]).abs().max() > 0.01
