"""Resume a training that was killed, from checkpoints in files without pickle."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO

from fp4dit.utils import pytree_io
from fp4dit.utils.save_timer import LONGEST, SaveTimer

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


class TimedCheckpoint(L.Callback):
    """Saves a checkpoint as often as a `SaveTimer` says.

    Lightning's own callback does not save by time if a task uses manual optimization.

    Args:
        path: The file of the checkpoint.
        seconds: The longest time between two checkpoints.

    Example:
        >>> callback = TimedCheckpoint(Path("last.safetensors"), seconds=60.0)
        >>> trainer = lightning.Trainer(callbacks=[callback], plugins=[SafetensorsIO()])
    """

    def __init__(self, path: Path, seconds: float = LONGEST) -> None:
        self.path, self.seconds = path, seconds
        self.timer = SaveTimer(seconds)

    def on_train_start(self, *_: Any) -> None:
        self.timer = SaveTimer(self.seconds)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.strategy.broadcast(self.timer.is_due):
            return
        if not self.timer.save(lambda: trainer.save_checkpoint(self.path), self.path):
            # The processes that do not write wait at this barrier for the one that does.
            trainer.strategy.barrier()


class PartialResults:
    """The finished parts of work that is done part by part, in a file.

    Args:
        path: The file; None for work that is not resumed.
        seconds: The longest time between two saves. See `SaveTimer`.

    Example:
        >>> results = PartialResults(Path("draft/unit_3/parts.safetensors"))
        >>> parts = results.load()
        >>> for layer in layers[len(parts) :]:
        ...     parts.append(fit_layer(layer))
        ...     results.save(lambda: parts)
    """

    def __init__(self, path: Path | None, seconds: float = LONGEST) -> None:
        self.path, self.timer = path, SaveTimer(seconds)

    def load(self) -> list[Any]:
        """Return the parts that an earlier run had finished and saved."""
        checkpoint = self.path and load_checkpoint(self.path)
        return checkpoint["parts"] if checkpoint else []

    def save(self, make_parts: Callable[[], list[Any]]) -> None:
        """Save all parts that are finished so far, if that is due."""
        path = self.path
        if path and self.timer.is_due:
            self.timer.save(lambda: pytree_io.save_tree({"parts": make_parts()}, path), path)

    def remove(self) -> None:
        """Remove the file, when all parts are finished."""
        if self.path:
            self.path.unlink(missing_ok=True)


@dataclass(frozen=True)
class ResumableTrainers:
    """A factory of Trainers whose fits are resumed from the last checkpoint in `folder`.

    The folder must belong to one fit. That of a stage's draft does, because the draft is named by
    the key of all its inputs.

    Args:
        make: Returns a Trainer, given further arguments of it.
        folder: The folder of the checkpoints; None for fits that are not resumed.
        seconds: The longest time between two checkpoints. See `SaveTimer`.

    Example:
        >>> trainers = ResumableTrainers(lightning.Trainer, Path("draft/unit_3"))
        >>> trainers.fit(task, max_steps=1000)
    """

    make: Callable[..., L.Trainer]
    folder: Path | None = None
    seconds: float = LONGEST

    def __call__(self, **options: Any) -> L.Trainer:
        return self.make(**options)

    def for_part(self, name: str) -> "ResumableTrainers":
        """Return the factory for one of several fits that are made one after another."""
        return replace(self, folder=self.folder and self.folder / name)

    def make_results(self) -> PartialResults:
        """Return the results of the parts of a method that does not train, or of several fits."""
        path = self.folder and self.folder / "parts.safetensors"
        return PartialResults(path, self.seconds)

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


def load_checkpoint(path: Path) -> Any:
    """Return the content of a checkpoint; None, with a warning, if the file is damaged."""
    try:
        return pytree_io.load_tree(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("ignoring checkpoint %s, this part begins again: %s", path, error)
        return None
