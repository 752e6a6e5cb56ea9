"""Reconstruction of every model family: memory, number of passes, and bit-exact propagation."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fp4dit.calibration.capture import CaptureTask, PromptBatch, batch_prompts
from fp4dit.calibration.captured_calls import load_calls, split_rows
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.propagate import propagate_unit
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.estimate.footprint import measure_footprint
from fp4dit.estimate.machine import Machine
from fp4dit.estimate.stages import Estimator, count_calls
from fp4dit.models.base import Pipeline, PipelineSource
from fp4dit.models.blocks import ReadOnlyState, Unit, flatten_outputs
from fp4dit.quantization.apply import quantize_weights_
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import assign_rules, find_layers
from fp4dit.rounding.adaround import adaround_scale_aware
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils import calls
from fp4dit.utils.calls import Call
from tests.helpers import tiny
from tests.helpers.model_families import make_weight_rules

CPU = Machine(torch.device("cpu"), 1.0, 0, 0, None)


def capture_calls(pipeline: Pipeline, prompts: list[str], folder: Path) -> dict[str, RowSource]:
    tiny.trainer()().predict(
        CaptureTask(pipeline, folder, 2, 4.5),
        tiny.load_one_by_one(batch_prompts(prompts, 2, seed=5)),
    )
    return load_calls(folder)


def reconstruct(
    pipeline: Pipeline,
    columns: dict[str, RowSource],
    folder: Path,
    method: RoundingMethod | None = None,
    batch_size: int = 8,
    **options: Any,
) -> list[Any]:
    """Reconstruct a model on captured calls, and return the reports of its units."""
    assigned = assign_rules(
        find_layers(pipeline.transformer), make_weight_rules(pipeline.transformer)
    )
    folder.mkdir()
    reconstruction = Reconstruction(
        pipeline,
        assigned,
        method or RoundToNearest(),
        *split_rows(columns, 3),
        batch_size,
        folder,
        **options,
    )
    return reconstruction.run(columns, tiny.trainer)


def measure_row_bytes(columns: dict[str, RowSource], rows: int) -> dict[str, float]:
    return {name: column[:].nbytes / rows for name, column in columns.items()}


@torch.no_grad()
def test_a_footprint_has_the_bytes_of_every_activation(
    family: str,
    family_source: PipelineSource,
    family_pipeline: Pipeline,
    prompts: list[str],
    tmp_path: Path,
):
    task = CaptureTask(family_pipeline, tmp_path, 3, 4.5)
    task.predict_step(PromptBatch(0, prompts[:2], [5, 6]))
    state = load_calls(tmp_path)
    footprint = measure_footprint(family_source.build_on_meta())
    guidance = 1.0 if family == "flux" else 4.5  # Flux takes guidance as an argument
    rows = count_calls(2, 3, guidance)
    assert measure_row_bytes(state, rows) == footprint.input_bytes | {"prompt": 8}
    for unit, expected in zip(family_pipeline.units(), footprint.units, strict=True):
        module = family_pipeline.transformer.get_submodule(unit.module)
        outputs = propagate_unit(module, unit, state, 4, "cpu")
        assert measure_row_bytes(outputs, rows) == expected.output_bytes
        state = state | outputs
    tensors = load_file(tmp_path / "00000.safetensors").values()
    written = sum(tensor[:].nbytes for tensor in tensors)
    estimator = Estimator(footprint, CPU, 0.0, torch.float32)
    prompt_bytes = 8 * rows // 3  # the number of the prompt of each row
    assert written - estimator.count_capture_bytes(2, 3, guidance) == prompt_bytes


@dataclass
class PeakMemory(MemoryBudget):
    """Memory budget that records the largest use."""

    peak_bytes: int = 0

    def allocate(self, *args: Any) -> Any:
        column = super().allocate(*args)
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return column


@torch.no_grad()
def test_reconstruction_uses_as_many_bytes_as_estimated(
    family_source: PipelineSource, family_pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    columns, memory = capture_calls(family_pipeline, prompts, tmp_path), PeakMemory()
    reconstruct(family_pipeline, columns, tmp_path / "units", memory=memory)
    footprint = measure_footprint(family_source.build_on_meta())
    estimator = Estimator(footprint, CPU, 0.0, torch.float32)
    assert memory.peak_bytes == len(columns["prompt"]) * estimator.count_stream_bytes()


def test_capture_costs_one_pass_and_reconstruction_two(
    family: str, family_pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    transformer = family_pipeline.transformer
    blocks = [unit.module for unit in family_pipeline.units() if "blocks." in unit.module]
    counts = []  # the rows that pass through a norm of the first and of the last block
    for name in (blocks[0], blocks[-1]):
        modules = transformer.get_submodule(name).modules()
        counts.append(tiny.count(next(m for m in modules if isinstance(m, nn.LayerNorm))))
    columns = capture_calls(family_pipeline, prompts, tmp_path)
    rows = len(columns["prompt"])
    calls_per_step = 1 if family == "flux" else 2  # with and without the condition
    assert rows == 4 * 2 * calls_per_step  # prompts, steps
    assert [sum(count) for count in counts] == [rows, rows]
    reports = reconstruct(family_pipeline, columns, tmp_path / "units")
    assert [sum(count) for count in counts] == [3 * rows, 3 * rows]
    errors = {report["unit"]: report["error"] for report in reports}
    assert 0 < errors[blocks[-1]] < 0.5


def stack_rows(calls_leaves: Sequence[Sequence[Any]]) -> dict[str, Tensor]:
    """Concatenate the tensors with one row per sample in the flattened values of several calls.

    Returns:
        The tensors, by their position in a call.
    """
    count = len(next(leaf for leaf in calls_leaves[0] if isinstance(leaf, Tensor)))
    columns = {}
    for i, leaves in enumerate(zip(*calls_leaves, strict=True)):
        if isinstance(leaves[0], Tensor) and len(leaves[0]) == count:
            columns[str(i)] = torch.cat(leaves)
    return columns


def record_unit_dataset(
    unit: Unit, original: nn.Module, quantized: nn.Module, recorded: Sequence[Call], rows: Tensor
) -> UnitDataset:
    """Run both models as a whole, and record the inputs and the target outputs of one unit."""
    targets: list[tuple[Tensor, ...]] = []
    handle = original.get_submodule(unit.module).register_forward_hook(
        lambda _m, _a, output: targets.append(flatten_outputs(output))
    )
    with (
        torch.no_grad(),
        calls.record_calls(quantized.get_submodule(unit.module)) as unit_calls,
    ):
        for call in recorded:
            call(original)
            call(quantized)
    handle.remove()
    leaves, spec = tree_flatten((unit_calls[0].args, unit_calls[0].kwargs))

    def make_call(state: ReadOnlyState) -> Call:
        return Call(
            *tree_unflatten([state.get(str(i), leaf) for i, leaf in enumerate(leaves)], spec)
        )

    inputs = stack_rows([tree_leaves((call.args, call.kwargs)) for call in unit_calls])
    columns = stack_rows(targets)
    recorded_unit = Unit(unit.module, tuple(inputs), make_call, tuple(columns))
    return UnitDataset(recorded_unit, inputs, columns, rows)


def reconstruct_by_whole_passes(
    pipeline: Pipeline, recorded: Sequence[Call], method: RoundingMethod, rows: Tensor
) -> dict[str, Tensor]:
    """Reconstruct without propagation: for each unit, both models run as a whole.

    Returns:
        The hard weight of each layer.
    """
    original, quantized = copy.deepcopy(pipeline.transformer), pipeline.transformer
    assigned = assign_rules(find_layers(quantized), make_weight_rules(quantized))
    quant_layers: dict[str, QuantLayer] = {}
    for unit in pipeline.units():
        dataset = record_unit_dataset(unit, original, quantized, recorded, rows)
        rules = {name: rule for name, rule in assigned.items() if unit.contains(name)}
        layers = quantize_weights_(quantized, rules)
        for layer in layers.values():
            layer.prepare()
        if layers:
            module = quantized.get_submodule(unit.module)
            method.round_unit(module, list(layers.values()), dataset, tiny.trainer())
        quant_layers |= layers
    return {name: layer.weight_matrix for name, layer in quant_layers.items()}


@pytest.mark.parametrize("family", ["alpha", "hunyuan", "flux"], indirect=True)
@pytest.mark.unchecked
def test_propagation_learns_the_same_weights_as_whole_passes(
    family_pipeline: Pipeline, prompts: list[str], tmp_path: Path
):
    pipeline = family_pipeline
    pipeline.units()  # runs a model that has to be traced
    learned = tiny.learned_rounding(adaround_scale_aware, steps=5)
    copies = [copy.deepcopy(pipeline), copy.deepcopy(pipeline)]
    with calls.record_calls(pipeline.transformer) as recorded:
        task = CaptureTask(pipeline, tmp_path, 2, 4.5)
        task.predict_step(PromptBatch(0, prompts, [1, 2, 3, 4]))
    columns = load_calls(tmp_path)
    rows, _ = split_rows(columns, 3)
    reconstruct(pipeline, columns, tmp_path / "units", learned, len(columns["prompt"]) // 2)
    expected = reconstruct_by_whole_passes(copies[0], recorded, learned, rows)
    nearest = reconstruct_by_whole_passes(copies[1], recorded, RoundToNearest(), rows)
    for name, weight in expected.items():
        assert torch.equal(pipeline.transformer.get_submodule(name).weight_matrix, weight)
    changed = [name for name in expected if not torch.equal(expected[name], nearest[name])]
    assert len(changed) > 10
