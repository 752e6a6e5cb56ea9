"""Progress with the time left: a bar on a terminal, a line now and then in a log or where jobs share a screen."""

import time
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pipelines.parted import Parts
from pipelines.runtime import Clock

EVERY = 10.0  # seconds between lines


def span(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def parts_of(trainer: Trainer) -> Parts | None:
    """What is predicted, if it is of parts of which others make some."""
    given = getattr(trainer.predict_dataloaders, "dataset", None)
    return given if isinstance(given, Parts) else None


class Progress(ProgressBar):
    """Counts batches of whatever the Trainer does: fit, test or predict."""

    def __init__(self, label: str, bar: bool, clock: Clock) -> None:
        super().__init__()
        self.label, self.is_bar, self.clock = label, bar, clock
        self.bar: tqdm | None = None
        self.start = self.begun = self.done = self.total = 0

    def disable(self) -> None:
        """Called on all ranks but the first."""
        self.is_bar, self.clock = False, Clock(float("inf"))

    def begin(self, total: float, done: int = 0) -> None:
        self.start, self.begun, self.done = time.monotonic(), done, done
        self.total = int(total) if total != float("inf") else 0
        if self.is_bar:
            self.bar = tqdm(desc=self.label, total=self.total or None, initial=done, dynamic_ncols=True, leave=False)

    def advance(self, done: int) -> None:
        if self.bar:
            self.bar.update(done - self.done)
        self.done = done
        now = time.monotonic()
        if not self.is_bar and now - self.clock.last >= EVERY:
            self.clock.last = now
            print(self.line(now - self.start), flush=True)

    def line(self, elapsed: float) -> str:
        left = elapsed / max(1, self.done - self.begun) * (self.total - self.done)
        ahead = f"  {span(left)} left" if self.total else ""
        return f"{self.label}  {self.done}/{self.total or '?'}  {span(elapsed)} elapsed{ahead}"

    def end(self) -> None:
        if self.bar:
            self.bar.close()
            self.bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A task that steps its optimizers itself has the steps of each counted.
        total = trainer.max_steps // (1 if pl_module.automatic_optimization else len(trainer.optimizers))
        if total <= 0:
            total = trainer.num_training_batches * (trainer.max_epochs or 1)
        self.begin(total, trainer.fit_loop.total_batch_idx + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.advance(trainer.fit_loop.total_batch_idx + 1)
        if self.bar:
            self.bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = parts_of(trainer)
        self.begin(len(parts.items) if parts else sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        parts = parts_of(trainer)
        self.advance((parts.passed if parts else self.done) + 1)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.advance(self.done + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.end()
