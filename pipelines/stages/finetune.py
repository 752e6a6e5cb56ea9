"""The stage that fine-tunes a quantized model. Its files are those of the reconstruct stage."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from fp4dit.calibration.captured_calls import load_calls, split_rows
from fp4dit.calibration.dataset import UnitDataset
from fp4dit.calibration.histograms import copy_weights
from fp4dit.calibration.measure import compute_call_error
from fp4dit.calibration.propagate import compute_relative_error, propagate_unit
from fp4dit.calibration.saved_rows import SavedRows
from fp4dit.data.columns import MemoryBudget, RowSource
from fp4dit.data.segments import select_subset_of
from fp4dit.estimate.stages import Estimator, StageCost
from fp4dit.models.base import Pipeline, PipelineSource
from fp4dit.models.blocks import RowSources, split_by_unit
from fp4dit.quantization import apply, rules
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule
from fp4dit.quantization.timestep_ranges import base_layer_name
from fp4dit.rounding.finetune import (
    Finetuning,
    WholeModel,
    check_finetunable,
    pass_gradients_through,
    restore_latent_,
)
from fp4dit.rounding.unit_files import UNITS, load_quantized_, save_layers, unit_path
from fp4dit.utils.files import read_json, write_csv, write_json
from fp4dit.utils.resumable import ResumableTrainers
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage
from pipelines.stages.capture import Calibration


@dataclass(frozen=True)
class Finetune(Stage):
    """Tunes all quantized weights together, so that the outputs match those of the original model.

    Example:
        See the node `finetune` of `conf/stages/finetune.yaml`.
    """

    model: PipelineSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    finetune: Finetuning
    calibration: Calibration

    def check(self) -> None:
        check_finetunable(self.activation)
        apply.check_activations(
            self.model.build_on_meta().transformer, self.weight, self.activation
        )

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        num_train, num_val = self.calibration.num_rows
        batch_size = self.finetune.batch_size
        # Targets of all rows, the errors before and after, and three passes for each step.
        num_calls = num_train + 3 * num_val + 3 * self.finetune.steps * batch_size
        return make_estimator().estimate_replay(
            0, num_calls, batch_size, self.activation, "finetune.batch_size"
        )

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        memory = MemoryBudget(1e9 * runtime.memory_budget_gb, out)
        columns = load_calls(needs["calls"] / "calls", memory)
        train_rows, val_rows = split_rows(columns, self.calibration.num_prompts)
        original = self.model.load()
        original.to(runtime.device)
        original.load_call_kinds(needs["calls"] / "calls")
        teacher = WholeModel(original)
        unit = teacher.make_unit(list(columns))
        batch_size, device = self.calibration.replay_batch_size, runtime.device
        progress = partial(runtime.iter_with_progress, "finetune: outputs of the original")
        resume_folder = out / "finetune.resume"
        saved = SavedRows(resume_folder / "targets")
        target = propagate_unit(teacher, unit, columns, batch_size, device, memory, progress, saved)
        pipeline, activations = self.load_quantized(needs, runtime)
        student, layers = WholeModel(pipeline), find_quantized_layers(pipeline)
        val_columns, val_target = (select_subset(each, val_rows) for each in (columns, target))

        def compute_outputs(name: str) -> RowSources:
            module, saved = student.to(device), SavedRows(resume_folder / name)
            return propagate_unit(
                module, unit, val_columns, batch_size, device, memory, saved=saved
            )

        error_before = compute_relative_error(compute_outputs("before"), val_target)
        restore_latent_weights(layers, original)
        trainers = ResumableTrainers(partial(runtime.make_trainer, "finetune"), resume_folder)
        dataset = UnitDataset(unit, columns, target, train_rows, memory)
        with pass_gradients_through(activations):
            curve = self.finetune.round_unit(student, list(layers.values()), dataset, trainers)
        (out / UNITS).mkdir(exist_ok=True)
        blocks = pipeline.units()
        parts = split_by_unit(layers, blocks)
        for number, (block, block_layers) in enumerate(zip(blocks, parts, strict=True), 1):
            save_layers(block_layers, unit_path(out / UNITS, number, block))
        write_csv(out / "curve.csv", [{"unit": "whole", **point} for point in curve])
        outputs = compute_outputs("after")
        error = compute_relative_error(outputs, val_target)
        write_json(out / "blocks.json", [{"unit": "whole", "error": error, "before": error_before}])
        # Fine-tuning does not minimize the error of single blocks, so it is not reported.
        summary = read_json(needs["weights"] / "audit.json")
        summary.pop("block_error", None)
        call_error = compute_call_error(pipeline, outputs, val_target)
        numbers = {"steps": self.finetune.steps, "call_error": call_error}
        write_json(out / "audit.json", summary | numbers)
        shutil.rmtree(resume_folder, ignore_errors=True)

    def load_quantized(
        self, needs: Needs, runtime: Runtime
    ) -> tuple[Pipeline, dict[str, FakeQuantize]]:
        """Load the quantized model, and return it with its activation quantizers."""
        pipeline = self.model.load()
        pipeline.to(runtime.device)
        pipeline.load_call_kinds(needs["calls"] / "calls")
        activations, _ = load_quantized_(
            pipeline,
            self.weight,
            self.activation,
            needs["weights"],
            needs["activations"],
        )
        return pipeline, activations


def find_quantized_layers(pipeline: Pipeline) -> dict[str, QuantLayer]:
    """Return the quantized layers of the transformer by name."""
    layers = {}
    for name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, QuantLayer):
            layers[name] = layer
    return layers


def select_subset(columns: Mapping[str, RowSource], rows: Tensor) -> dict[str, RowSource]:
    """Return the columns restricted to some rows."""
    return {name: select_subset_of(column, rows) for name, column in columns.items()}


def restore_latent_weights(layers: Mapping[str, QuantLayer], original: Pipeline) -> None:
    """Restore the latent weights of all layers from the original model, in place."""
    weights = copy_weights(rules.find_layers(original.transformer))
    for name, layer in layers.items():
        restore_latent_(layer, weights[base_layer_name(name)])
