"""The stage that trains a transformer from random weights."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L

from fp4dit.lowbit_training.linear import TrainRule, save_trained_weights
from fp4dit.pretraining.data import SceneData, SceneStream, SeedNoise
from fp4dit.pretraining.denoising import OPTIMIZERS, DenoisingTask
from fp4dit.utils.files import write_json
from fp4dit.utils.resumable import SafetensorsIO, TimedCheckpoint, load_checkpoint
from pipelines.runtime.callbacks import LossLog, StepTimer
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage
from pipelines.stages.sharded import load_one_by_one


@dataclass(frozen=True)
class Training:
    """Options of a training run.

    Args:
        steps: The number of batches.
        seed: The seed of the initial weights, the data and the noise.
        precision: Lightning's `precision`.
        data: Makes the data, given the seed.
        validation: The batches on which the loss is measured after training.
        num_validation_batches: The number of these batches.
        task: Makes the task, given the rules for linear layers.

    Example:
        See `conf/training/shapes.yaml`.
    """

    steps: int
    seed: int
    precision: str
    data: Callable[..., SceneData]
    validation: SceneStream
    num_validation_batches: int
    task: Callable[..., DenoisingTask]


@dataclass(frozen=True)
class Train(Stage):
    """Trains a transformer from random weights on one device, and saves the averaged weights.

    The initial weights, the data and the noise do not depend on `lowbit_linear`, so that trainings
    in different formats can be compared.

    Args:
        training: The options of the training run.
        lowbit_linear: The formats in which linear layers multiply; empty for full precision.

    Example:
        See the node `train` of `conf/stages/train.yaml`.
    """

    training: Training
    lowbit_linear: Sequence[TrainRule]

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        options, timer = self.training, StepTimer()
        resume_folder = out / "train.resume"
        checkpoint = resume_folder / "last.safetensors"
        resume_folder.mkdir(exist_ok=True)
        L.seed_everything(options.seed, verbose=False)
        task = options.task(linear=self.lowbit_linear)
        callbacks = [
            SeedNoise(options.seed),
            timer,
            LossLog(out / "loss.csv", options.steps),
            TimedCheckpoint(checkpoint, 60.0),
        ]
        trainer = self.make_trainer(
            runtime,
            callbacks=callbacks,
            plugins=[SafetensorsIO()],
            max_steps=options.steps * OPTIMIZERS,
        )
        resume_path = checkpoint if load_checkpoint(checkpoint) else None
        trainer.fit(task, options.data(seed=options.seed), ckpt_path=resume_path)
        # Seeded again, so that the noise of the loss is the same for every training.
        L.seed_everything(options.seed, verbose=False)
        batches = list(islice(options.validation, options.num_validation_batches))
        validator = self.make_trainer(runtime)
        [scores] = validator.test(task, load_one_by_one(batches), verbose=False)
        save_trained_weights(task.average.module, out / "transformer.safetensors")
        summary = {"steps": options.steps, "loss": scores["loss"], "step_seconds": timer.median}
        write_json(out / "audit.json", summary)
        shutil.rmtree(resume_folder)

    def make_trainer(self, runtime: Runtime, **options: Any) -> L.Trainer:
        precision = self.training.precision
        return runtime.make_trainer("train", devices=1, precision=precision, **options)
