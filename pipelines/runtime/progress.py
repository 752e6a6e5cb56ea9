"""Progress of Lightning's loops: a bar on a terminal, or lines in a log."""

import time
from typing import Any, Protocol, runtime_checkable

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from pipelines.runtime.clock import SECONDS_BETWEEN_LINES, LastPrinted, format_clock


@runtime_checkable
class CountsProgress(Protocol):
    """A dataset that counts its finished items itself, because other processes make some too."""

    num_done: int

    @property
    def total(self) -> int:
        """The number of all items."""
        ...


class ProgressReporter(ProgressBar):
    """Counts the batches of a fit, test or predict loop and shows the time left.

    Args:
        label: The text before the count.
        bar: Show a bar; otherwise print lines.
        last_printed: The time of the last line, shared by the reporters of one job.

    Example:
        >>> reporter = ProgressReporter("capture", bar=False, last_printed=LastPrinted())
        >>> lightning.Trainer(callbacks=[reporter]).predict(task, batches)
        capture  3/24  0:12 elapsed  1:24 left
    """

    def __init__(self, label: str, bar: bool, last_printed: LastPrinted) -> None:
        super().__init__()
        self.label, self.is_bar, self.last_printed = label, bar, last_printed
        self.bar: tqdm | None = None
        self.start = self.first = self.count = self.total = 0

    def disable(self) -> None:
        """Show nothing. Lightning calls this on all ranks but the first."""
        self.is_bar, self.last_printed = False, LastPrinted(float("inf"))

    def begin(self, total: float, count: int = 0) -> None:
        """Start the display of `total` items, of which `count` are done."""
        self.start, self.first, self.count = time.monotonic(), count, count
        self.total = int(total) if total != float("inf") else 0
        if self.is_bar:
            self.bar = tqdm(
                desc=self.label,
                total=self.total or None,
                initial=count,
                dynamic_ncols=True,
                leave=False,
            )

    def advance(self, count: int) -> None:
        """Show that `count` items are done. Lines are printed some seconds apart."""
        if self.bar:
            self.bar.update(count - self.count)
        self.count = count
        now = time.monotonic()
        if not self.is_bar and now - self.last_printed.time >= SECONDS_BETWEEN_LINES:
            self.last_printed.time = now
            print(self.format_line(now - self.start), flush=True)

    def format_line(self, elapsed: float) -> str:
        """Return the line that is printed after `elapsed` seconds."""
        left = elapsed / max(1, self.count - self.first) * (self.total - self.count)
        remaining = f"  {format_clock(left)} left" if self.total else ""
        counts = f"{self.count}/{self.total or '?'}"
        return f"{self.label}  {counts}  {format_clock(elapsed)} elapsed{remaining}"

    def end(self) -> None:
        """Remove the bar."""
        if self.bar:
            self.bar.close()
            self.bar = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # With manual optimization Lightning counts the steps of every optimizer.
        steps_per_batch = 1 if pl_module.automatic_optimization else len(trainer.optimizers)
        total = trainer.max_steps // steps_per_batch
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
        counter = find_counter(trainer)
        self.begin(counter.total if counter else sum(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        counter = find_counter(trainer)
        # The dataset counts an item only when it is asked for the next one, so this one is added.
        self.advance((counter.num_done if counter else self.count) + 1)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begin(sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.advance(self.count + 1)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.end()


def find_counter(trainer: Trainer) -> CountsProgress | None:
    """Return the dataset of a predict loop if it counts its finished items itself."""
    dataset = getattr(trainer.predict_dataloaders, "dataset", None)
    return dataset if isinstance(dataset, CountsProgress) else None
