"""Test latent weights, the model as one unit, and fine-tuning that resumes bit-exactly."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.histograms import copy_weights
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.numerics.formats import floating, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import MinMax
from fp4dit.quantization import apply, rules
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer, make_quant_layer
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.base import Curve
from fp4dit.rounding.finetune import (
    Finetuning,
    LatentWeight,
    WholeModel,
    check_finetunable,
    pass_gradients_through,
    restore_latent_,
)
from fp4dit.rounding.learned import fused_adam
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import ResumableTrainers
from tests.calibration.test_activations import DYNAMIC
from tests.calibration.test_propagate import make_call, unpatchify_output
from tests.helpers import tiny
from tests.helpers.small_runs import FEW, run_stages
from tests.rounding.test_reconstruction import Killed
from tests.utils.test_resumable import counted, keeping, same

QUANTIZERS = [
    Quantizer(floating(2, 1), PerGroup(16)),
    Quantizer(integer(4, signed=False), PerChannel(), MinMax()),
    Quantizer(nf4, PerGroup(16)),
]


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda q: q.format.name)
class TestLatentWeight:
    def make_layer(self, quantizer: Quantizer) -> tuple[QuantLayer, Tensor]:
        torch.manual_seed(0)
        source = nn.Linear(64, 8)
        before = source.weight.detach().clone()
        layer = make_quant_layer(source, quantizer).prepare()
        layer.commit_weight()
        return layer, before

    def test_restored_weights_are_rounded_to_the_hard_ones(self, quantizer: Quantizer):
        layer, before = self.make_layer(quantizer)
        # Learned weights are not always rounded to nearest.
        layer.weight_matrix[0, :4] = layer.weight_fake_quant(before.flip(0))[0, :4]
        hard = layer.weight_matrix.clone()
        restore_latent_(layer, before)
        is_restored = (layer.weight_matrix - before).abs() < 1e-6
        assert is_restored[1:].all()
        assert not is_restored[0, :4].all()
        torch.testing.assert_close(
            layer.start_learning(LatentWeight).hard_weight().view_as(hard), hard
        )

    def test_gradients_pass_the_rounding(self, quantizer: Quantizer):
        layer, before = self.make_layer(quantizer)
        hard = layer.weight_matrix.clone()
        restore_latent_(layer, before)
        rounding = layer.start_learning(LatentWeight)
        soft, rounding_loss = rounding.soft_weight()
        torch.testing.assert_close(soft.detach().view_as(hard), hard)
        slope = torch.randn_like(soft)
        soft.backward(slope)
        # d soft / d v is the length of a unit of the grid.
        qparams = layer.weight_fake_quant.qparams
        unit = qparams.from_grid(torch.ones_like(soft)) - qparams.from_grid(torch.zeros_like(soft))
        torch.testing.assert_close(rounding.v.grad, slope * unit)
        assert rounding_loss == 0

    def test_a_latent_weight_is_clamped_and_keeps_its_gradient(self, quantizer: Quantizer):
        layer, _ = self.make_layer(quantizer)
        rounding, fmt = layer.start_learning(LatentWeight), layer.weight_fake_quant.format
        with torch.no_grad():
            rounding.v.fill_(fmt.max + 100)
        rounding.soft_weight()[0].sum().backward()
        assert rounding.v.detach().max() == fmt.max
        assert (rounding.v.grad != 0).all()


def test_gradients_pass_activation_quantizers_in_the_block():
    fake_quant = FakeQuantize(Quantizer(floating(2, 1), PerChannel()))
    x = torch.randn(4, 16, requires_grad=True)
    expected = fake_quant(x)
    with pass_gradients_through({"x": fake_quant}):
        out = fake_quant(x)
    assert out.detach().equal(expected.detach())
    (slope,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert slope.equal(torch.ones_like(x))
    (slope_after,) = torch.autograd.grad(fake_quant(x), x, torch.ones_like(x))
    assert not slope_after.equal(torch.ones_like(x))


@torch.no_grad()
def test_the_whole_model_as_one_unit(pipeline: PixArtAdapter):
    call = make_call()
    state = pipeline.initial_state(call)
    whole = WholeModel(pipeline)
    (output,) = whole.make_unit(list(state)).make_call(state)(whole)
    assert unpatchify_output(pipeline.transformer, output).equal(call(pipeline.transformer)[0])


def finetune_model(
    loaded: PixArtAdapter, method: Finetuning, trainers: ResumableTrainers
) -> tuple[dict[str, Tensor], Curve, list[float]]:
    """Fine-tune a model; return its layers' state, its curve, and its error before and after."""
    original, pipeline = copy.deepcopy(loaded), copy.deepcopy(loaded)
    columns = pipeline.initial_state(make_call())
    teacher, student = WholeModel(original), WholeModel(pipeline)
    unit, rows = teacher.make_unit(list(columns)), torch.arange(5)
    target = propagate_unit(teacher, unit, columns, 5, "cpu")
    before = copy_weights(rules.find_layers(pipeline.transformer))
    layers = apply.quantize_weights_(
        pipeline.transformer,
        rules.assign_rules(rules.find_layers(pipeline.transformer), tiny.rules()),
    )
    activations, _ = apply.quantize_activations_(pipeline.transformer, [DYNAMIC])
    for layer in layers.values():
        layer.prepare().commit_weight()

    def compute_error() -> float:
        outputs = propagate_unit(student, unit, columns, 5, "cpu")
        return compute_relative_error(outputs, target, rows)

    start = compute_error()
    for name, layer in layers.items():
        restore_latent_(layer, before[name])
    assert compute_error() != start  # the weights are in full precision until they are learned
    with pass_gradients_through(activations):
        curve = method.round_unit(
            student, list(layers.values()), UnitDataset(unit, columns, target, rows), trainers
        )
    state = {}
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            state[f"{name}.{key}"] = value
    return state, curve, [start, compute_error()]


METHOD = Finetuning(
    LatentWeight, partial(fused_adam, lr=0.02), RelativeMSE(0.0), 12, 5, average=0.5
)


@pytest.mark.unchecked
def test_finetuning_lowers_the_error_and_stays_on_the_grid(loaded: PixArtAdapter):
    state, curve, (start, end) = finetune_model(
        loaded, replace(METHOD, steps=40, average=None), tiny.trainer()
    )
    assert end < 0.9 * start
    assert curve[0] == {"step": 0, "error": 1.0, "rounding_loss": 0.0}
    pipeline = copy.deepcopy(loaded)
    layers = apply.quantize_weights_(
        pipeline.transformer,
        rules.assign_rules(rules.find_layers(pipeline.transformer), tiny.rules()),
    )
    for name, layer in layers.items():
        layer_state = {}
        for key, value in state.items():
            if key.startswith(f"{name}."):
                layer_state[key.removeprefix(f"{name}.")] = value
        layer.load_state_dict(layer_state)
        torch.testing.assert_close(
            layer.weight_fake_quant(layer.weight_matrix), layer.weight_matrix
        )


@pytest.mark.parametrize("average", [None, 0.5])
@pytest.mark.unchecked
def test_resumed_finetuning_has_the_same_bits(
    loaded: PixArtAdapter, tmp_path: Path, average: float | None
):
    method, again = replace(METHOD, average=average), []
    whole = finetune_model(loaded, method, tiny.trainer())
    with pytest.raises(Killed):
        finetune_model(loaded, counted(method, [], 8), keeping(tmp_path))
    resumed = finetune_model(loaded, counted(method, again), keeping(tmp_path))
    assert same(resumed[:2], whole[:2])
    assert len(again) == method.steps - 7


@pytest.mark.unchecked
def test_finetuning_ends_with_the_moving_average(loaded: PixArtAdapter):
    last, _, _ = finetune_model(loaded, replace(METHOD, average=None), tiny.trainer())
    mean, _, _ = finetune_model(loaded, replace(METHOD, average=0.9), tiny.trainer())
    assert last.keys() == mean.keys()
    assert any(not last[name].equal(mean[name]) for name in last)


def test_a_nonfinite_gradient_is_an_error(loaded: PixArtAdapter):
    def diverging(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=float("inf"))

    with pytest.raises(
        UserError, match=r"step 1 has no finite gradient: give a smaller finetune\.optimizer\.lr"
    ):
        finetune_model(loaded, replace(METHOD, optimizer=diverging), tiny.trainer())


def test_scales_per_timestep_cannot_be_finetuned():
    check_finetunable([DYNAMIC, Rule("x", None, per_timestep=True)])
    with pytest.raises(
        UserError,
        match="this preset cannot be fine-tuned: its activation rule 'y' has scales for each",
    ):
        check_finetunable([replace(DYNAMIC, match="y", per_timestep=True)])


@pytest.mark.unchecked
def test_the_finetune_stage_writes_the_files_of_reconstruct(tmp_path: Path):
    paths = run_stages(
        tmp_path,
        "method=w4a4_ft",
        "rounding=nearest",
        "finetune.steps=10",
        "finetune.batch_size=4",
        small=FEW,
    )
    finetuned, before = paths["finetune"], paths["reconstruct"]
    unit_files = sorted(file.name for file in (finetuned / "units").glob("*.safetensors"))
    assert unit_files == sorted(file.name for file in (before / "units").glob("*.safetensors"))
    assert not list(finetuned.glob("*.resume"))
    (whole,) = json.loads((finetuned / "blocks.json").read_text())
    assert whole["error"] < whole["before"]
    scalars = json.loads((paths["score"] / "metrics.json").read_text())["scalars"]
    assert scalars["steps"] == 10
    assert scalars["bits_weight"] == json.loads((before / "audit.json").read_text())["bits_weight"]
    assert "block_error" not in scalars
    tuned, activate = (
        json.loads((folder / "audit.json").read_text()) for folder in (finetuned, paths["activate"])
    )
    assert scalars["call_error"] == tuned["call_error"] != activate["call_error"]  # from before
