"""Going on with a training that was killed, from what was kept of it now and then, in files without pickle."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins import CheckpointIO

from fp4dit import tree

log = logging.getLogger(__name__)

Witness = Sequence[int | float]


class TensorIO(CheckpointIO):
    """Reads and writes Lightning's checkpoints as safetensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        tree.save(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return tree.load(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


@dataclass(frozen=True)
class Pause:
    """Is over `seconds` after its start."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        return time.monotonic() - self.start >= self.seconds


def kept(save: Callable[[], None], path: Path) -> bool:
    """Whether `save` went well. A full disk takes the chance to go on from here, and not the training."""
    try:
        save()
    except OSError as error:
        log.warning("%s could not be written, so a killed run would begin earlier: %s", path, error)
        return False
    return True


class Keep(L.Callback):
    """Saves every so many seconds. Lightning's own does not, by time, where a task steps its optimizers itself."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.path, self.pause = path, Pause(seconds)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.strategy.broadcast(self.pause.over):
            if not kept(lambda: trainer.save_checkpoint(self.path), self.path):
                trainer.strategy.barrier()  # where the processes that do not write wait for the one that does
            self.pause = Pause(self.pause.seconds)


@dataclass(frozen=True)
class Trainers:
    """Makes Trainers, and keeps in `folder`, if there is one, how far they are: every so many `seconds`, so that
    nothing is written for what takes less.

    A witness is some numbers that tell what is being fitted from all else that could be. It is compared with some
    tolerance, for another device computes the same data a little differently.
    """

    make: Callable[..., L.Trainer]
    folder: Path | None = None
    seconds: float = 60.0

    def __call__(self, **options: Any) -> L.Trainer:
        return self.make(**options)

    def within(self, name: str) -> "Trainers":
        """For one of several fits."""
        return replace(self, folder=self.folder and self.folder / name)

    def fit(self, task: L.LightningModule, witness: Callable[[], Witness], **options: Any) -> None:
        """`Trainer.fit`, from where it was last kept. The task saves its `witness` with its checkpoint."""
        if self.folder is None:
            self(**options).fit(task)
            return
        path = self.folder / "fit.safetensors"
        usable = found(path, witness) is not None
        more = {"plugins": [TensorIO()], "callbacks": [Keep(path, self.seconds)]}
        self(**options, **more).fit(task, ckpt_path=path if usable else None)


class Parts:
    """The finished parts of what is fitted one after another, of which none should be fitted twice."""

    def __init__(self, trainers: Trainers, witness: Callable[[], Witness]) -> None:
        self.path = trainers.folder and trainers.folder / "parts.safetensors"
        self.witness = witness() if self.path else ()  # as long as all is as it was
        self.pause = Pause(trainers.seconds)

    def load(self) -> list[Any]:
        checkpoint = self.path and found(self.path, lambda: self.witness)
        return checkpoint["parts"] if checkpoint else []

    def save(self, parts: Callable[[], list[Any]]) -> None:
        """All that are finished by now, if it is time for that."""
        path = self.path
        if path and self.pause.over:
            kept(lambda: tree.save({"witness": self.witness, "parts": parts()}, path), path)
            self.pause = Pause(self.pause.seconds)


def found(path: Path, witness: Callable[[], Witness] | None = None) -> Any:
    """What was kept there; None, and a line in the log, if it is damaged or, by its witness, of something else."""
    try:
        checkpoint = tree.load(path)
        if witness and not alike(checkpoint["witness"], witness()):
            raise ValueError("it is of other weights or data")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("%s is of no use, so what it was kept of begins again: %s", path, error)
        return None
    return checkpoint


def alike(a: Witness, b: Witness) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-3) for x, y in zip(a, b, strict=True))
