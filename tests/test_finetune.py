"""Weights behind the rounded ones, a whole model as one unit, and tuning that ends with the same bits after a kill."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dit import policy
from fp4dit.errors import UserError
from fp4dit.examples import Examples
from fp4dit.formats import floating, integer, nf4
from fp4dit.grid import Grid
from fp4dit.histograms import originals
from fp4dit.layer import QuantLayer, wrap
from fp4dit.models.pixart import PixArtPipeline
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.resume import Trainers
from fp4dit.rounding import adam
from fp4dit.scales import MinMax
from fp4dit.stream import advance, relative_error
from fp4dit.tasks.finetune import Latent, Tuning, Whole, check_trainable, reopen_, straight
from fp4dit.tasks.reconstruct import Curve, Relative
from tests import tiny
from tests.test_activate import ONLINE
from tests.test_end_to_end import FEW, run
from tests.test_reconstruct import Killed
from tests.test_resume import counted, keeping, same
from tests.test_stream import call, unpatchify

QUANTIZERS = [
    Quantizer(floating(2, 1), Granularity("group", 16)),
    Quantizer(integer(4, signed=False), Granularity("row"), MinMax()),
    Quantizer(nf4, Granularity("group", 16)),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
class TestLatent:
    def layer(self, quantizer: Quantizer) -> tuple[QuantLayer, Tensor]:
        torch.manual_seed(0)
        source = nn.Linear(64, 8)
        before = source.weight.detach().clone()
        layer = wrap(source, quantizer).prepare()
        layer.freeze()
        return layer, before

    def test_what_is_opened_again_is_rounded_to_what_it_was(self, quantizer: Quantizer):
        layer, before = self.layer(quantizer)
        layer.rows[0, :4] = layer.grid(before.flip(0))[0, :4]  # as if learnt: not what is nearest
        hard = layer.rows.clone()
        reopen_(layer, before)
        kept = (layer.rows - before).abs() < 1e-6
        assert kept[1:].all()
        assert not kept[0, :4].all()
        torch.testing.assert_close(layer.learn(Latent).hard().view_as(hard), hard)

    def test_gradients_pass_the_rounding(self, quantizer: Quantizer):
        layer, before = self.layer(quantizer)
        hard = layer.rows.clone()
        reopen_(layer, before)
        rounder = layer.learn(Latent)
        soft, indecision = rounder.soft()
        torch.testing.assert_close(soft.detach().view_as(hard), hard)
        slope = torch.randn_like(soft)
        soft.backward(slope)
        # d soft / d v is the length of a unit of the grid, by finite differences of the map back
        scaling = layer.grid.scaling
        unit = scaling.from_grid(torch.ones_like(soft)) - scaling.from_grid(torch.zeros_like(soft))
        torch.testing.assert_close(rounder.v.grad, slope * unit)
        assert indecision == 0

    def test_a_weight_comes_back_from_beyond_the_end(self, quantizer: Quantizer):
        layer, _ = self.layer(quantizer)
        rounder, fmt = layer.learn(Latent), layer.grid.format
        with torch.no_grad():
            rounder.v.fill_(fmt.max + 100)
        rounder.soft()[0].sum().backward()
        assert rounder.v.detach().max() == fmt.max
        assert (rounder.v.grad != 0).all()


def test_activations_are_as_they_were_and_let_gradients_through():
    grid = Grid(Quantizer(floating(2, 1), Granularity("row")))
    x = torch.randn(4, 16, requires_grad=True)
    expected = grid(x)
    with straight({"x": grid}):
        out = grid(x)
    assert out.detach().equal(expected.detach())
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert slope.equal(torch.ones_like(x))
    assert not torch.autograd.grad(grid(x), x, torch.ones_like(x))[0].equal(torch.ones_like(x))  # no longer


@torch.no_grad()
def test_a_model_as_one_unit_answers_as_the_model(pipeline: PixArtPipeline):
    given = call()
    state = pipeline.begin(given)
    whole = Whole(pipeline)
    (answer,) = whole.unit(list(state)).call(state)(whole)
    assert unpatchify(pipeline.dit, answer).equal(given(pipeline.dit)[0])


def tuned(loaded: PixArtPipeline, plan: Tuning, trainers: Trainers) -> tuple[dict[str, Tensor], Curve, list[float]]:
    """What is left of a tiny model after tuning, and its error before and after."""
    original, pipeline = copy.deepcopy(loaded), copy.deepcopy(loaded)
    columns = pipeline.begin(call())
    teacher, student = Whole(original), Whole(pipeline)
    unit, rows = teacher.unit(list(columns)), torch.arange(5)
    target = advance(teacher, unit, columns, 5, "cpu")
    before = originals(policy.layers(pipeline.dit))
    layers = policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    activations, _ = policy.quantize_activations_(pipeline.dit, [ONLINE])
    for layer in layers.values():
        layer.prepare().freeze()
    error = lambda: relative_error(advance(student, unit, columns, 5, "cpu"), target, rows)
    start = error()
    for name, layer in layers.items():
        reopen_(layer, before[name])
    assert error() != start  # for the weights are full precision, until they are learnt
    with straight(activations):
        curve = plan(student, list(layers.values()), Examples(unit, columns, target, rows), trainers)
    state = {f"{name}.{key}": v for name, layer in layers.items() for key, v in layer.state_dict().items()}
    return state, curve, [start, error()]


PLAN = Tuning(Latent, partial(adam, lr=0.02), Relative(0.0), 12, 5, average=0.5)


@pytest.mark.unchecked
def test_tuning_brings_the_whole_model_nearer_and_stays_on_the_grid(loaded: PixArtPipeline):
    state, curve, (start, end) = tuned(loaded, replace(PLAN, steps=40, average=None), tiny.trainer())
    assert end < 0.9 * start
    assert curve[0] == {"step": 0, "error": 1.0, "indecision": 0.0}
    pipeline = copy.deepcopy(loaded)
    layers = policy.quantize_weights_(pipeline.dit, policy.assign(policy.layers(pipeline.dit), tiny.rules()))
    for name, layer in layers.items():
        layer.load_state_dict(
            {key.removeprefix(f"{name}."): v for key, v in state.items() if key.startswith(f"{name}.")}
        )
        torch.testing.assert_close(layer.grid(layer.rows), layer.rows)


@pytest.mark.parametrize("average", [None, 0.5])
@pytest.mark.unchecked
def test_killed_tuning_ends_with_the_same_bits(loaded: PixArtPipeline, tmp_path: Path, average: float | None):
    plan, again = replace(PLAN, average=average), []
    whole = tuned(loaded, plan, tiny.trainer())
    with pytest.raises(Killed):
        tuned(loaded, counted(plan, [], 8), keeping(tmp_path))
    resumed = tuned(loaded, counted(plan, again), keeping(tmp_path))
    assert same(resumed[:2], whole[:2])
    assert len(again) == plan.steps - 7


@pytest.mark.unchecked
def test_the_mean_of_all_steps_is_what_it_ends_with(loaded: PixArtPipeline):
    last, mean = (tuned(loaded, replace(PLAN, average=a), tiny.trainer())[0] for a in (None, 0.9))
    assert last.keys() == mean.keys()
    assert any(not last[name].equal(mean[name]) for name in last)


def test_a_gradient_that_is_no_number_stops_it_and_names_the_step(loaded: PixArtPipeline):
    def diverging(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=float("inf"))

    with pytest.raises(UserError, match=r"step 1 has no finite gradient: give a smaller tuning\.optimizer\.lr"):
        tuned(loaded, replace(PLAN, optimizer=diverging), tiny.trainer())


def test_scales_for_each_timestep_cannot_be_tuned_with():
    check_trainable([ONLINE, Rule("x", None, timed=True)])
    with pytest.raises(
        UserError, match="this preset cannot be fine-tuned: its activation rule 'y' has scales for each"
    ):
        check_trainable([replace(ONLINE, match="y", timed=True)])


def test_the_stage_leaves_what_reconstruction_leaves(tmp_path: Path):
    paths = run(tmp_path, "method=w4a4_ft", "rounding=nearest", "tuning.steps=30", "tuning.batch=4", small=FEW)
    made, before = paths["finetune"], paths["reconstruct"]
    names = lambda path: sorted(file.name for file in (path / "units").glob("*.safetensors"))
    assert names(made) == names(before)
    assert not list(made.glob("*.kept"))
    (whole,) = json.loads((made / "blocks.json").read_text())
    assert whole["error"] < whole["before"]
    scalars = json.loads((paths["score"] / "metrics.json").read_text())["scalars"]
    assert scalars["steps"] == 30
    assert scalars["bits_weight"] == json.loads((before / "audit.json").read_text())["bits_weight"]
    assert "block_error" not in scalars
