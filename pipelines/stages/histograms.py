"""The stage that collects histograms for reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp4dit.calibration import histograms
from fp4dit.calibration.captured_calls import load_steps
from fp4dit.calibration.histograms import HistogramTask
from fp4dit.estimate.stages import Estimator, StageCost
from fp4dit.models.base import PipelineSource
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, find_layers
from fp4dit.quantization.timestep_ranges import base_layer_name
from fp4dit.rounding.unit_files import load_quantized_
from fp4dit.utils.files import write_json
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage
from pipelines.stages.capture import Calibration
from pipelines.stages.replay import replay_steps


@dataclass(frozen=True)
class Histograms(Stage):
    """Computes histograms of weights and activations on the grids of their formats.

    Example:
        >>> Histograms(model, weight, activation, calibration).run(needs, out, runtime)
    """

    model: PipelineSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    calibration: Calibration

    def estimate_cost(self, make_estimator: Callable[[], Estimator]) -> StageCost:
        return make_estimator().estimate_replay(
            0,
            self.calibration.num_rows[1],
            self.calibration.replay_batch_size,
            self.activation,
            "calibration.batch_size",
        )

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        pipeline = self.model.load()
        pipeline.load_call_kinds(needs["calls"] / "calls")
        model = pipeline.transformer
        originals = histograms.copy_weights(find_layers(model))
        activations, _ = load_quantized_(
            pipeline,
            self.weight,
            self.activation,
            needs["weights"],
            needs["activations"],
        )
        _, val_steps = load_steps(needs["calls"] / "calls", self.calibration.num_prompts)
        task = HistogramTask(pipeline, activations)
        make_trainer = partial(runtime.make_trainer, "histograms", devices=1)
        resume_path = out / "histograms.resume"
        replay_steps(task, val_steps, make_trainer, resume_path)
        weights = {}
        for name, layer in model.named_modules():
            if isinstance(layer, QuantLayer):
                original = originals[base_layer_name(name)]
                weights[name] = histograms.compute_weight_histogram(layer, original).to_dict()
        inputs = {name: histogram.to_dict() for name, histogram in task.histograms.items()}
        write_json(out / "histograms.json", {"weight": weights, "activation": inputs})
        resume_path.unlink(missing_ok=True)
