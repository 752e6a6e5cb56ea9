"""The stage that calibrates static activation quantizers."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fp4dit.calibration.activations import ObserveTask, ReplayTask, save_scales
from fp4dit.calibration.captured_calls import CapturedSteps, load_steps
from fp4dit.calibration.measure import MeasureTask, PredictTask
from fp4dit.estimate.footprint import count_bit_operations
from fp4dit.estimate.stages import Estimator, StageCost
from fp4dit.models.base import PipelineSource
from fp4dit.quantization.apply import check_activations
from fp4dit.quantization.audit import audit_to_dicts, effective_bits
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.unit_files import SCALES, UNITS, load_weights_
from fp4dit.utils.files import write_csv, write_json
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage
from pipelines.stages.capture import Calibration
from pipelines.stages.replay import replay_steps


@dataclass(frozen=True)
class Activate(Stage):
    """Calibrates static activation quantizers, with quantized weights, and measures all quantizers.

    Example:
        See the node `activate` of `conf/stages/default.yaml`.
    """

    model: PipelineSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    calibration: Calibration

    def check(self) -> None:
        check_activations(self.model.build_on_meta().transformer, self.weight, self.activation)

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        num_train, num_val = self.calibration.num_rows
        num_observed = num_train if any(rule.observer for rule in self.activation) else 0
        return make_estimator().estimate_replay(
            num_observed + num_val,  # the error of calls is that against full precision
            num_val,
            self.calibration.replay_batch_size,
            self.activation,
            "calibration.batch_size",
        )

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        resume_folder = out / "activate.resume"

        def replay(name: str, task: ReplayTask, steps: CapturedSteps) -> None:
            make_trainer = partial(runtime.make_trainer, f"activate: {name}", devices=1)
            replay_steps(task, steps, make_trainer, resume_folder / f"{name}.safetensors")

        pipeline = self.model.load()
        pipeline.load_call_kinds(needs["calls"] / "calls")
        train_steps, val_steps = load_steps(needs["calls"] / "calls", self.calibration.num_prompts)
        predict = PredictTask(pipeline)
        replay("predict", predict, val_steps)
        activations, rules = load_weights_(
            pipeline, self.weight, self.activation, needs["weights"] / UNITS
        )
        observed = {}
        for name, rule in rules.items():
            # The reconstruct stage may have calibrated some already.
            if rule.observer and activations[name].qparams is None:
                observed[name] = rule
        if observed:
            observe = ObserveTask(pipeline, activations, observed, self.calibration.token_sample)
            replay("observe", observe, train_steps)
            observe.calibrate()
        measure = MeasureTask(pipeline, activations, predict.predictions)
        replay("measure", measure, val_steps)
        save_scales(activations, out / SCALES)
        write_csv(out / "sqnr.csv", measure.compute_sqnr())
        write_json(out / "audit.json", self.summarize(measure, rules))
        shutil.rmtree(resume_folder, ignore_errors=True)

    def summarize(self, measure: MeasureTask, rules: Mapping[str, Rule]) -> dict[str, Any]:
        """Return the error of calls, and the format and the bits of every activation."""
        audit = measure.audit_activations(rules)
        operations = count_bit_operations(self.model.build_on_meta(), self.weight, self.activation)
        return {
            "call_error": measure.compute_call_error(),
            "layers": audit_to_dicts(audit),
            "bits_activation": effective_bits(audit) if audit else 16.0,
            "bit_operations": operations,
        }
