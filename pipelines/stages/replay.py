"""Replays of captured calls that resume if they are killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from torch.utils.data import Subset

from fp4dit.calibration.activations import ReplayTask
from fp4dit.calibration.captured_calls import CapturedSteps
from fp4dit.utils import pytree_io
from fp4dit.utils.resumable import load_checkpoint
from fp4dit.utils.save_timer import SaveTimer
from pipelines.stages.sharded import load_one_by_one


def replay_steps(
    task: ReplayTask, steps: CapturedSteps, make_trainer: Callable[..., Trainer], path: Path
) -> None:
    """Let a task replay captured steps, after those that a killed run has replayed.

    Args:
        task: The task.
        steps: The captured steps.
        make_trainer: Returns a Trainer, given further arguments of it.
        path: The file of what the task has collected. It remains, for the caller to remove.
    """
    saved, first = load_checkpoint(path), 0
    if saved is not None:
        first = saved["num_steps"]
        task.set_progress(saved["progress"])
    if first < len(steps):
        remaining = Subset(steps, range(first, len(steps)))
        trainer = make_trainer(callbacks=[ReplayCheckpoint(path, first)])
        trainer.test(task, load_one_by_one(remaining), verbose=False)


class ReplayCheckpoint(Callback):
    """Saves what a task has collected from the steps that it has replayed.

    Args:
        path: The file.
        first: The number of the steps that were replayed before.

    Example:
        >>> trainer = lightning.Trainer(callbacks=[ReplayCheckpoint(Path("observe.resume"), 0)])
        >>> trainer.test(ObserveTask(pipeline, activations, rules), steps)
    """

    def __init__(self, path: Path, first: int) -> None:
        self.path, self.first, self.timer = path, first, SaveTimer()

    def on_test_batch_end(
        self, trainer: Trainer, task: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if self.timer.is_due:
            self.timer.save(lambda: self.write(task, self.first + batch_idx + 1), self.path)

    def write(self, task: ReplayTask, num_steps: int) -> None:
        """Write the file after so many steps."""
        content = {"num_steps": num_steps, "progress": task.get_progress()}
        pytree_io.save_tree(content, self.path)
