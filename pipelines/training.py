"""What a long training needs from its Trainer: a way to stop it, and a record of its losses."""

import csv
import signal
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lightning import Callback, LightningModule, Trainer

from pipelines.progress import EVERY, span


class Stop(Callback):
    """SIGTERM or Ctrl-C to any process ends the training of all after the batch, so that it can be saved.

    Lightning's own handler communicates at once, amid whatever the processes are exchanging.
    """

    asked = stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, *_: Any) -> None:
        self.asked = True

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.stopped = trainer.strategy.reduce_boolean_decision(self.asked, all=False)
        trainer.should_stop = trainer.should_stop or self.stopped


class Pace(Callback):
    """How long steps take, whatever else a training does."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    @property
    def median(self) -> float:
        return median(self.seconds)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]


class Losses(Callback):
    """Means over `every` batches, appended to a CSV (batch, seconds, ...). With a `label` they are shown, and the time
    left."""

    def __init__(self, path: Path, total: int, label: str | None = None, every: int = 20) -> None:
        self.path, self.label, self.total, self.every = path, label, total, every
        self.values: defaultdict[str, list[float]] = defaultdict(list)
        self.start = self.shown = 0.0
        self.first = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = self.shown = time.monotonic()
        self.first = trainer.fit_loop.total_batch_idx + 1
        if trainer.is_global_zero and self.path.exists():
            self.forget(self.first)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        done = trainer.fit_loop.total_batch_idx + 1
        if not trainer.is_global_zero:
            return
        for name, value in trainer.callback_metrics.items():
            self.values[name].append(value.item())
        if done % self.every and done < self.total:
            return
        row = {name: round(fmean(values), 5) for name, values in self.values.items()}
        self.values.clear()
        now = time.monotonic()
        self.write({"batch": done, "seconds": round(now - self.start, 1), **row})
        if self.label and (now - self.shown >= EVERY or done >= self.total):
            self.shown = now
            left = (now - self.start) / (done - self.first) * (self.total - done)
            losses = "  ".join(f"{name} {value:.4f}" for name, value in row.items())
            print(f"{self.label}  {done}/{self.total}  {losses}  {span(left)} left", flush=True)

    def forget(self, last: int) -> None:
        """The rows after batch `last`, which a killed training wrote, the last one perhaps in part, and this one will
        write again."""
        header, *rows = self.path.read_bytes().splitlines(keepends=True) or [b""]
        before = (row for row in rows if row.endswith(b"\n") and int(row.partition(b",")[0]) <= last)
        self.path.write_bytes(b"".join([header, *before]))

    def write(self, row: dict[str, float]) -> None:
        fresh = not self.path.exists() or not self.path.stat().st_size
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if fresh:
                writer.writeheader()
            writer.writerow(row)
