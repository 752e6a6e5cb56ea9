"""Layers that are others in each range of timesteps."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fp4dit import policy
from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.formats import integer
from fp4dit.layer import wrap
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.ranges import Ranges, names, shares, whole
from fp4dit.reconstruction import Reconstruction, load_calls, load_steps, load_weights_, split
from fp4dit.tasks.activate import Measure
from fp4dit.tasks.capture import CaptureTask, chunked
from fp4dit.tasks.reconstruct import Rounded
from fp4dit.transforms import Balance
from tests import tiny

FOUR, FINE = (Quantizer(integer(bits), Granularity("row")) for bits in (4, 16))


def three() -> Ranges:
    torch.manual_seed(0)
    layers = [wrap(nn.Linear(8, 4), FOUR) for _ in range(3)]
    return Ranges(layers, [100.0, 500.0], Clock())


def test_each_row_goes_through_the_layer_of_its_time():
    ranges, x = three(), torch.randn(6, 5, 8)
    ranges.clock.set(torch.tensor([700.0, 100.0, 101.0, 0.0, 500.0, 999.0]))
    answer = ranges(x)
    for row, layer in enumerate([2, 0, 1, 0, 1, 2]):
        torch.testing.assert_close(answer[row], ranges.layers[layer](x[row : row + 1])[0])
    for now, layer in ((300, 1), (900, 2)):
        ranges.clock.set(torch.tensor(now))  # one number for all rows
        assert torch.equal(ranges(x), ranges.layers[layer](x))


def test_shares_tell_the_rows_of_each_range():
    ranges, timestep = three(), torch.tensor([700.0, 100.0, 101.0, 0.0])
    assert [its.tolist() for _, its in shares(ranges, timestep)] == [
        [False, True, False, True],
        [False, False, True, False],
        [True, False, False, False],
    ]
    assert [its.tolist() for _, its in shares(ranges.layers[0], timestep)] == [[True] * 4]
    with pytest.raises(UserError, match=r"no calibration call is in range 1 of 3 .* reach from 300 to 700"):
        list(shares(ranges, torch.tensor([300.0, 700.0])))


def test_names_of_ranges_lead_back_to_the_layer_and_its_rule():
    found = dict(names("a.b", three()))
    assert list(found) == ["a.b.ranges.0", "a.b.ranges.1", "a.b.ranges.2"]
    assert {whole(name) for name in found} == {"a.b"}
    assert policy.first("a.b.ranges.1", [Rule("a.b", FOUR)])


def test_a_model_with_ranges_is_reconstructed_and_comes_back(
    pipeline: PixArtPipeline, loaded: PixArtPipeline, tmp_path: Path
):
    """Each range has a balance by its own inputs, the copies count, and what is loaded follows the sampler's time."""
    task = CaptureTask(pipeline, tmp_path, steps=4, guidance=4.5)
    tiny.trainer()().predict(task, tiny.one_by_one(chunked(tiny.PROMPTS, 2, seed=5)))
    rules, plain = (
        everywhere(FINE, by_row=["pos_embed.proj"], transforms=[Balance()], ranges=ends) for ends in ([500.0], [])
    )
    ours, theirs = (policy.check_weights(pipeline.dit, given) for given in (rules, plain))
    assert [a.bits / b.bits for a, b in zip(ours, theirs, strict=True)] == [1.0] + [2.0] * (len(ours) - 1)

    state, assigned, out = load_calls(tmp_path), policy.assign(policy.layers(pipeline.dit), rules), tmp_path / "units"
    out.mkdir()
    reports = Reconstruction(pipeline, assigned, Rounded(), *split(state, 3), 8, out).run(state, tiny.trainer)
    assert max(report["error"] for report in reports) < 1e-6
    layer = pipeline.dit.get_submodule("transformer_blocks.0.ff.net.0.proj")
    assert isinstance(layer, Ranges)
    early, late = (part.transforms[0].divisor for part in layer.layers)
    assert not torch.equal(early, late)

    replayed = copy.deepcopy(loaded)
    activations, _ = load_weights_(replayed, rules, [Rule("*.proj", FOUR)], out)
    measure = Measure(replayed, activations)
    tiny.trainer()().test(measure, tiny.one_by_one(load_steps(tmp_path, 3)[1]), verbose=False)
    seen = {(row["layer"].rpartition(".")[2], float(row["timestep"]) > 500) for row in measure.sqnr()}
    assert seen & {("0", True), ("0", False), ("1", True), ("1", False)} == {("0", False), ("1", True)}

    fresh = copy.deepcopy(loaded)
    load_weights_(fresh, rules, [], out)
    for a, b in zip(pipeline.dit.state_dict().values(), fresh.dit.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    images = [made.sample(tiny.PROMPTS[:2], [7, 8], 4, 4.5) for made in (loaded, fresh)]
    torch.testing.assert_close(*images, rtol=0, atol=2e-3)
    with torch.no_grad():
        fresh.dit.get_submodule("proj_out").ranges[1].source.weight.zero_()  # of the first two steps
    assert (fresh.sample(tiny.PROMPTS[:2], [7, 8], 4, 4.5) - images[0]).abs().max() > 0.01
