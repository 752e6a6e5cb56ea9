"""The stage that trains a transformer anew."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from fp4dit.models.shapes.data import Noise, SceneData, Scenes
from fp4dit.resume import Keep, TensorIO, found
from fp4dit.tasks.pretrain import OPTIMIZERS, DenoisingTask
from fp4dit.training.layer import TrainRule, save_weights
from pipelines.parted import one_by_one
from pipelines.runtime import Runtime
from pipelines.stages import write_json
from pipelines.training import Losses, Pace


@dataclass(frozen=True)
class Training:
    """`steps` batches of `data`. The loss that counts is that of so many `measured_batches` of `measured`."""

    steps: int
    seed: int
    precision: str
    data: Callable[..., SceneData]
    measured: Scenes
    measured_batches: int
    task: Callable[..., DenoisingTask]


@dataclass(frozen=True)
class Train:
    """The averaged weights, on one device, from the same random ones and data whatever `linear` is."""

    training: Training
    linear: Sequence[TrainRule]

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        t, kept, pace = self.training, out / "kept", Pace()
        last = kept / "last.safetensors"
        kept.mkdir(exist_ok=True)
        L.seed_everything(t.seed, verbose=False)
        task = t.task(linear=self.linear)
        callbacks = [Noise(t.seed), pace, Losses(out / "loss.csv", t.steps), Keep(last, 60.0)]
        trainer = self.trainer(runtime, callbacks=callbacks, plugins=[TensorIO()], max_steps=t.steps * OPTIMIZERS)
        trainer.fit(task, t.data(seed=t.seed), ckpt_path=last if found(last) else None)
        L.seed_everything(t.seed, verbose=False)  # the same noise for whatever is measured
        batches = list(islice(t.measured, t.measured_batches))
        [measured] = self.trainer(runtime).test(task, one_by_one(batches), verbose=False)
        save_weights(task.average.module, out / "transformer.safetensors")
        write_json(out / "audit.json", {"steps": t.steps, "loss": measured["loss"], "step_seconds": pace.median})
        shutil.rmtree(kept)

    def trainer(self, runtime: Runtime, **options: Any) -> L.Trainer:
        return runtime.trainer("train", devices=1, precision=self.training.precision, **options)
