"""Callbacks for training runs: stop on a signal, time the steps, log the losses."""

import csv
import signal
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning import Callback, LightningModule, Trainer

from pipelines.runtime.clock import SECONDS_BETWEEN_LINES, format_clock


class StopOnSignal(Callback):
    """Stops all processes of a training after the batch in which one received SIGTERM or Ctrl-C.

    The state can then be saved. Lightning's own handler communicates with the other processes at
    once, which can break an exchange of gradients that is under way.

    Attributes:
        stopped: Whether a signal has stopped the training.

    Example:
        >>> stop = StopOnSignal()
        >>> lightning.Trainer(callbacks=[stop]).fit(task)
        >>> stop.stopped
        False
    """

    requested = stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.request_stop)

    def request_stop(self, *_: Any) -> None:
        """Handle a signal: stop after this batch."""
        self.requested = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.stopped = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        trainer.should_stop = trainer.should_stop or self.stopped


class StepTimer(Callback):
    """Measures the seconds of each training step, without the time between steps.

    Example:
        >>> timer = StepTimer()
        >>> lightning.Trainer(callbacks=[timer]).fit(task)
        >>> timer.median
        0.21
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def median(self) -> float:
        """The median of the seconds."""
        return median(self.seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class LossLog(Callback):
    """Writes a row to a CSV file after every `every` batches: batch, seconds, mean losses.

    Args:
        path: The CSV file, which a resumed training continues.
        total: The number of batches of the whole training.
        label: The text before lines with the losses and the time left; None to print no lines.
        every: The number of batches of one row.

    Example:
        >>> log = LossLog(Path("loss.csv"), total=1000, label="transformer")
        >>> lightning.Trainer(max_steps=1000, callbacks=[log]).fit(task)
    """

    def __init__(self, path: Path, total: int, label: str | None = None, every: int = 20) -> None:
        self.path, self.label, self.total, self.every = path, label, total, every
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.start = self.last_printed = 0.0
        self.first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.last_printed = time.monotonic()
        self.first = trainer.fit_loop.total_batch_idx + 1
        if trainer.is_global_zero and self.path.exists():
            self.drop_rows_after(self.first)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx + 1
        if not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            self.values[name].append(value.item())
        if batch % self.every and batch < self.total:
            return
        means = {name: round(fmean(values), 5) for name, values in self.values.items()}
        self.values.clear()
        now = time.monotonic()
        self.append_row({"batch": batch, "seconds": round(now - self.start, 1), **means})
        due = now - self.last_printed >= SECONDS_BETWEEN_LINES or batch >= self.total
        if self.label and due:
            self.last_printed = now
            self.print_line(batch, means, now)

    def print_line(self, batch: int, means: dict[str, float], now: float) -> None:
        left = (now - self.start) / (batch - self.first) * (self.total - batch)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        line = f"{self.label}  {batch}/{self.total}  {losses}  {format_clock(left)} left"
        print(line, flush=True)

    def drop_rows_after(self, last: int) -> None:
        """Remove the rows after batch `last`, which a resumed training will write again.

        A killed training may have written the last row in part.
        """
        header, *rows = self.path.read_bytes().splitlines(keepends=True) or [b""]
        remaining = [header]
        for row in rows:
            if row.endswith(b"\n") and int(row.partition(b",")[0]) <= last:
                remaining.append(row)
        self.path.write_bytes(b"".join(remaining))

    def append_row(self, row: dict[str, float]) -> None:
        is_new = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
