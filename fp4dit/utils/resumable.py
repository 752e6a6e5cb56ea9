"""Resume a training that was killed, from checkpoints in files without pickle."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO

from fp4dit.utils import pytree_io

log = logging.getLogger(__name__)


class SafetensorsIO(CheckpointIO):
    """Reads and writes Lightning's checkpoints as safetensors.

    Example:
        >>> trainer = lightning.Trainer(plugins=[SafetensorsIO()])
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        pytree_io.save_tree(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return pytree_io.load_tree(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Interval:
    """A span of `seconds` from `start` on."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self.start >= self.seconds


def try_save(save: Callable[[], None], path: Path) -> bool:
    """Call `save` and return whether it succeeded; log a failure.

    Training continues although the disk is full. If it is killed, it resumes from an earlier
    checkpoint.
    """
    try:
        save()
    except OSError as error:
        log.warning(
            "could not write %s, so a killed run resumes from an earlier point: %s", path, error
        )
        return False
    return True


class TimedCheckpoint(L.Callback):
    """Saves a checkpoint every `seconds`.

    Lightning's own callback does not save by time if a task uses manual optimization.

    Example:
        >>> callback = TimedCheckpoint(Path("last.safetensors"), seconds=60.0)
        >>> trainer = lightning.Trainer(callbacks=[callback], plugins=[SafetensorsIO()])
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.interval = path, Interval(seconds)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.broadcast(self.interval.is_over):
            if not try_save(lambda: trainer.save_checkpoint(self.path), self.path):
                # The processes that do not write wait at this barrier for the one that does.
                trainer.strategy.barrier()
            self.interval = Interval(self.interval.seconds)


@dataclass(frozen=True)
class ResumableTrainers:
    """A factory of Trainers whose fits are resumed from the last checkpoint in `folder`.

    The folder must belong to one fit. That of a stage's draft does, because the draft is named by
    the key of all its inputs.

    Args:
        make: Returns a Trainer, given further arguments of it.
        folder: The folder of the checkpoints; None for fits that are not resumed.
        seconds: The time between checkpoints. A shorter fit writes none.

    Example:
        >>> trainers = ResumableTrainers(lightning.Trainer, Path("draft/unit_3"))
        >>> trainers.fit(task, max_steps=1000)
    """

    make: Callable[..., L.Trainer]
    folder: Path | None = None
    seconds: float = 60.0

    def __call__(self, **options: Any) -> L.Trainer:
        return self.make(**options)

    def for_part(self, name: str) -> "ResumableTrainers":
        """Return the factory for one of several fits that are made one after another."""
        return replace(self, folder=self.folder and self.folder / name)

    def fit(self, task: L.LightningModule, **options: Any) -> None:
        """Call `Trainer.fit`, from the last checkpoint if there is one."""
        if self.folder is None:
            self(**options).fit(task)
            return
        path = self.folder / "fit.safetensors"
        checkpoint = path if load_checkpoint(path) is not None else None
        callbacks = [TimedCheckpoint(path, self.seconds)]
        trainer = self(**options, plugins=[SafetensorsIO()], callbacks=callbacks)
        trainer.fit(task, ckpt_path=checkpoint)


class PartialResults:
    """The finished parts of several fits that are made one after another.

    Example:
        >>> results = PartialResults(trainers)
        >>> parts = results.load()
        >>> for layer in layers[len(parts) :]:
        ...     parts.append(fit_layer(layer))
        ...     results.save(lambda: parts)
    """

    def __init__(self, trainers: ResumableTrainers) -> None:
        self.path = trainers.folder and trainers.folder / "parts.safetensors"
        self.interval = Interval(trainers.seconds)

    def load(self) -> list[Any]:
        """Return the parts that an earlier run had finished and saved."""
        checkpoint = self.path and load_checkpoint(self.path)
        return checkpoint["parts"] if checkpoint else []

    def save(self, make_parts: Callable[[], list[Any]]) -> None:
        """Save all parts that are finished so far, if the interval is over."""
        path = self.path
        if path and self.interval.is_over:
            try_save(lambda: pytree_io.save_tree({"parts": make_parts()}, path), path)
            self.interval = Interval(self.interval.seconds)


def load_checkpoint(path: Path) -> Any:
    """Return the content of a checkpoint; None, with a warning, if the file is damaged."""
    try:
        return pytree_io.load_tree(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring checkpoint %s, this fit begins again: %s", path, error)
        return None
