"""Adapters of every model family: units, calls on the meta device, and images."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fp4dit.calibration.activations import load_scales_
from fp4dit.calibration.capture import CaptureTask, PromptBatch, batch_prompts
from fp4dit.calibration.captured_calls import load_steps
from fp4dit.data.prompts import get_texts
from fp4dit.evaluation.generate import GenerateTask
from fp4dit.models.base import Pipeline, PipelineSource
from fp4dit.numerics.formats import integer
from fp4dit.numerics.quantizer import PerToken, Quantizer
from fp4dit.packed.integer_inference import use_integer_arithmetic_
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.unit_files import load_weights_
from fp4dit.utils import calls
from pipelines.planning.plan import make_plan
from tests.calibration.test_propagate import propagate_all_units, record_outputs
from tests.conftest import Compose
from tests.helpers.model_families import FAMILIES, make_weight_rules
from tests.helpers.small_runs import FEW, run_stages

INT8_PER_TOKEN = Quantizer(integer(8), PerToken())


@pytest.mark.parametrize("quantized", [False, True], ids=["full precision", "quantized"])
@torch.no_grad()
@pytest.mark.unchecked
def test_units_compute_the_same_as_the_model(
    family_pipeline: Pipeline, prompts: list[str], tmp_path: Path, quantized: bool
):
    """On captured calls, the last unit is bit-exact in full precision and with quantized layers."""
    pipeline = family_pipeline
    pipeline.units()  # runs a model that has to be traced
    if quantized:
        rules = make_weight_rules(pipeline.transformer)
        assigned = assign_rules(find_layers(pipeline.transformer), rules)
        for layer in quantize_weights_(pipeline.transformer, assigned).values():
            layer.prepare().commit_weight()
        quantize_activations_(pipeline.transformer, [Rule("*", INT8_PER_TOKEN)])
    with calls.record_calls(pipeline.transformer) as recorded:
        CaptureTask(pipeline, tmp_path, 2, 4.5).predict_step(PromptBatch(0, prompts[:2], [5, 6]))
    states = list(load_steps(tmp_path, num_prompts=2)[0])
    last = pipeline.units()[-1]
    for call, state in zip(recorded, states, strict=True):
        timesteps = call.bind_arguments(pipeline.transformer)["timestep"]
        assert set(state["timestep"].tolist()) == set(timesteps.tolist())
        outputs = propagate_all_units(pipeline, state, size=4)
        expected = record_outputs(pipeline.transformer, call)
        assert torch.equal(outputs[last.outputs[0]], expected[last.module])


def test_units_hold_every_layer_once_in_execution_order(
    family_pipeline: Pipeline, prompts: list[str]
):
    transformer = family_pipeline.transformer
    units = [unit.module for unit in family_pipeline.units()]
    for name in find_layers(transformer):
        assert sum(name == unit or name.startswith(f"{unit}.") for unit in units) == 1
    executed: list[str] = []
    for name in units:
        transformer.get_submodule(name).register_forward_hook(
            lambda *_, name=name: executed.append(name)
        )
    family_pipeline.sample(prompts[:1], [0], 2, 4.5)
    assert executed == units * 2


def test_a_meta_call_has_the_shapes_of_a_sampling_call(
    family_source: PipelineSource, loaded_family: Pipeline, prompts: list[str]
):
    """Shapes and dtypes of the arguments and of the state are equal; all tensors are on meta."""
    transformer = loaded_family.transformer
    with calls.record_calls(transformer) as recorded:
        loaded_family.sample(prompts[:3], [0, 1, 2], 2, 4.5)
    first, skeleton = recorded[0], family_source.build_on_meta()
    meta = skeleton.meta_call(len(first.bind_arguments(transformer)["hidden_states"]))
    arguments = meta.bind_arguments(skeleton.transformer)
    assert describe_tensors(arguments) == describe_tensors(first.bind_arguments(transformer))
    for leaf in tree_leaves((meta.args, meta.kwargs)):
        assert not isinstance(leaf, Tensor) or leaf.is_meta
    state = skeleton.initial_state(meta)
    assert describe_tensors(state) == describe_tensors(loaded_family.initial_state(first))


def describe_tensors(tree: Any) -> Any:
    """Replace each tensor of a nested structure by its shape and dtype."""
    return tree_map(lambda x: (x.shape, x.dtype) if isinstance(x, Tensor) else x, tree)


def test_a_model_on_meta_has_the_layers_of_the_model(
    family_source: PipelineSource, loaded_family: Pipeline
):
    skeleton = family_source.build_on_meta().transformer
    assert get_shapes(skeleton) == get_shapes(loaded_family.transformer)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def get_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def test_the_noise_of_an_image_depends_on_its_own_seed(
    family_pipeline: Pipeline, prompts: list[str]
):
    images = family_pipeline.sample(prompts[:2], [1, 2], 2, 4.5)
    assert 0 <= images.min() < images.max() <= 1
    others = family_pipeline.sample([prompts[0], prompts[1]], [1, 3], 2, 4.5)
    assert torch.equal(images[0], others[0])
    assert not torch.equal(images[1], others[1])


@pytest.mark.unchecked
def test_stored_weights_draw_the_stored_images(
    family: str,
    family_folder: Path,
    family_source: PipelineSource,
    composed: Compose,
    tmp_path: Path,
):
    """A run goes through all stages; its weights and scales, loaded again, draw the same images."""
    overrides = [
        f"model.path={family_folder}",
        "model.dtype=float32",
        "metrics=paired",
        "rounding.steps=3",
        "rounding.batch_size=4",
        *FAMILIES[family].overrides,
    ]
    stage = make_plan(composed(*FEW, *overrides))["generate"].instantiate_stage()
    paths = run_stages(tmp_path, *overrides, small=FEW)
    pipeline = family_source.load()
    units = paths["reconstruct"] / "units"
    activations, _ = load_weights_(pipeline, stage.weight, stage.activation, units)
    load_scales_(activations, paths["activate"] / "scales.safetensors")
    use_integer_arithmetic_(pipeline.transformer)
    options = stage.generation
    texts = get_texts(stage.prompts(stage.count))
    for batch in batch_prompts(texts, options.batch_size, options.seed):
        GenerateTask(pipeline, tmp_path, options.steps, options.guidance).predict_step(batch)
    stored = read_images(paths["generate"] / "images")
    assert read_images(tmp_path) == stored
    reference = read_images(paths["reference"] / "images")
    assert all(a != b for a, b in zip(stored, reference, strict=True))


def read_images(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.png"))]
