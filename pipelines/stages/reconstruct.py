"""The stage that rounds the weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fp4dit.calibration.captured_calls import load_calls, split_rows
from fp4dit.data.columns import MemoryBudget
from fp4dit.estimate.stages import Estimator, StageCost
from fp4dit.models.base import PipelineSource
from fp4dit.quantization.audit import (
    audit_to_dicts,
    audit_weights,
    checkpoint_bytes,
    effective_bits,
    with_chosen_formats,
)
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding import reconstruction
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.reconstruction import Reconstruction
from fp4dit.rounding.unit_files import UNITS
from fp4dit.utils.files import write_csv, write_json
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage
from pipelines.stages.capture import Calibration


@dataclass(frozen=True)
class Reconstruct(Stage):
    """Rounds the weights and chooses their scales, unit by unit.

    Example:
        See the node `reconstruct` of `conf/stages/default.yaml`.
    """

    model: PipelineSource
    weight: Sequence[Rule]
    rounding: RoundingMethod
    calibration: Calibration
    activation: Sequence[Rule] | None = None

    def check(self) -> None:
        reconstruction.check_reconstruction(
            self.model.build_on_meta().transformer,
            self.weight,
            self.rounding,
            self.activation or (),
        )

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        return make_estimator().estimate_reconstruction(
            *self.calibration.num_rows,
            self.calibration.replay_batch_size,
            self.rounding,
            self.activation or (),
            "rounding.batch_size",
        )

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        pipeline = self.model.load()
        pipeline.to(runtime.device)
        model = pipeline.transformer
        audit = audit_weights(model, self.weight)
        packed_bytes = checkpoint_bytes(model, audit)
        reports = self.reconstruct_units(needs, out, runtime, pipeline)
        points, blocks = [], []
        for report in reports:
            blocks.append({"unit": report["unit"], "error": report["error"]})
            points += [{"unit": report["unit"], **point} for point in report["curve"]]
        write_csv(out / "curve.csv", points)
        write_json(out / "blocks.json", blocks)
        scalars = {
            "bits_weight": effective_bits(audit),
            "checkpoint_bytes": packed_bytes,
            "block_error": sum(block["error"] for block in blocks) / len(blocks),
            "steps": max((point["step"] + 1 for point in points), default=0),
        }
        layers = audit_to_dicts(with_chosen_formats(model, audit))
        write_json(out / "audit.json", {"layers": layers, **scalars})

    def reconstruct_units(
        self, needs: Needs, out: Path, runtime: Runtime, pipeline: Any
    ) -> list[dict]:
        """Round the weights of the pipeline, and return the report of each unit."""
        model = pipeline.transformer
        rules = assign_rules(find_layers(model), self.weight)
        (out / UNITS).mkdir(exist_ok=True)
        memory = MemoryBudget(1e9 * runtime.memory_budget_gb, out)
        columns = load_calls(needs["calls"] / "calls", memory)
        pipeline.load_call_kinds(needs["calls"] / "calls")
        train_rows, val_rows = split_rows(columns, self.calibration.num_prompts)
        work = Reconstruction(
            pipeline,
            rules,
            self.rounding,
            train_rows,
            val_rows,
            self.calibration.replay_batch_size,
            out / UNITS,
            activation=self.activation or (),
            memory=memory,
            tokens=self.calibration.token_sample,
        )
        return work.run(
            columns,
            lambda label: partial(runtime.make_trainer, f"reconstruct {label}"),
            partial(runtime.iter_with_progress, "reconstruct"),
        )
