"""The stage that fine-tunes a quantized model; it leaves what the `reconstruct` stage does."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fp4dit import policy
from fp4dit.columns import Room, Some
from fp4dit.estimate import Cost, Estimator
from fp4dit.examples import Examples
from fp4dit.histograms import originals
from fp4dit.layer import QuantLayer
from fp4dit.models.base import Source
from fp4dit.policy import Rule
from fp4dit.ranges import whole
from fp4dit.reconstruction import load_calls, load_weights_, save_layers, split
from fp4dit.resume import Trainers
from fp4dit.stream import advance, relative_error, within
from fp4dit.tasks.activate import load_scales_
from fp4dit.tasks.finetune import Tuning, Whole, check_trainable, reopen_, straight
from pipelines.runtime import Runtime
from pipelines.stages import Calibration, read_json, write_csv, write_json


@dataclass(frozen=True)
class Finetune:
    """Hard weights and their scales, learnt together from the answers of the whole model."""

    model: Source
    weight: Sequence[Rule]
    activation: Sequence[Rule]
    tuning: Tuning
    calibration: Calibration

    def check(self) -> None:
        check_trainable(self.activation)
        policy.check_activations(self.model.skeleton().dit, self.weight, self.activation)

    def cost(self, at: Estimator) -> Cost:
        trained, held_out = self.calibration.rows
        rows = trained + 2 * held_out + 3 * self.tuning.steps * self.tuning.batch
        return at.replay(0, rows, self.tuning.batch, self.activation, "tuning.batch")

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        c, room, size = self.calibration, Room(1e9 * runtime.memory_budget_gb, out), 2 * self.calibration.chunk
        columns = load_calls(needs["calls"] / "calls", room)
        trained, held_out = split(columns, c.trained)
        original = self.model.load()
        original.to(runtime.device)
        teacher = Whole(original)
        unit = teacher.unit(list(columns))
        watch = partial(runtime.watched, "finetune: what the original answers")
        target = advance(teacher, unit, columns, size, runtime.device, room, watch)

        pipeline = self.model.load()
        pipeline.to(runtime.device)
        activations, _ = load_weights_(pipeline, self.weight, self.activation, needs["weights"] / "units")
        load_scales_(activations, needs["activations"] / "scales.safetensors")
        before = originals(policy.layers(original.dit))
        layers = {name: layer for name, layer in pipeline.dit.named_modules() if isinstance(layer, QuantLayer)}
        student = Whole(pipeline)
        asked, wanted = ({name: Some(c, held_out) for name, c in some.items()} for some in (columns, target))
        answer = lambda: advance(student.to(runtime.device), unit, asked, size, runtime.device, room)
        error = lambda: relative_error(answer(), wanted)
        start = error()
        for name, layer in layers.items():
            reopen_(layer, before[whole(name)])
        kept = out / "tuning.kept"
        trainers = Trainers(partial(runtime.trainer, "finetune"), kept)
        with straight(activations):
            examples = Examples(unit, columns, target, trained, room)
            curve = self.tuning(student, list(layers.values()), examples, trainers)
        (out / "units").mkdir(exist_ok=True)
        for number, one in enumerate(pipeline.units(), 1):
            save_layers(within(layers, one), out / "units" / f"{number:03}_{one.module}.safetensors")
        write_csv(out / "curve.csv", [{"unit": "whole", **point} for point in curve])
        write_json(out / "blocks.json", [{"unit": "whole", "error": error(), "before": start}])
        # The error of a block is not what was learnt, nor is it measured again.
        made = {
            name: value for name, value in read_json(needs["weights"] / "audit.json").items() if name != "block_error"
        }
        write_json(out / "audit.json", made | {"steps": self.tuning.steps})
        shutil.rmtree(kept, ignore_errors=True)
