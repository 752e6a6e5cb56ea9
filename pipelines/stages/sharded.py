"""Stages that consist of shards, which several processes on any machines make in parallel."""

from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningModule
from torch.utils.data import DataLoader, IterableDataset

from fp4dit.store.draft import entry_path, lock_path
from fp4dit.store.locks import hold_lock, is_locked
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Needs, Stage


@dataclass
class ShardQueue(IterableDataset[Any]):
    """Queue of unfinished shards, shared by several processes through lock files.

    Iterating yields the shards in order, each while this process holds its lock.

    Args:
        items: The shards.
        outputs: The files of each shard. A shard is finished when all of them exist.
        stage: The folder of the finished stage. The lock file of a shard is called after this
            folder and the shard's number.
        job: The name of the job, which is shown by other processes that wait for this one.
        wait_for_others: After a first pass, wait for the shards that other processes hold, and
            make those whose holder died.
        num_done: The number of shards, from the first on, that need no more work in this process.

    Example:
        >>> queue = ShardQueue(items, paths, out, job="", wait_for_others=True)
        >>> trainer.predict(task, load_one_by_one(queue))
    """

    items: Sequence[Any]
    outputs: Sequence[Sequence[Path]]
    stage: Path
    job: str
    wait_for_others: bool
    num_done: int = 0
    _iterator: Generator[Any, None, None] | None = None

    @property
    def total(self) -> int:
        """The number of shards."""
        return len(self.items)

    def __len__(self) -> int:
        """Return one more than the number of shards.

        Without a length, Lightning asks for the next shard before this one is finished. With the
        exact length, it asks for nothing after the last shard, whose lock would not be released.
        """
        return len(self.items) + 1

    def __iter__(self) -> Iterator[Any]:
        self._iterator = self.acquire()
        return self._iterator

    def close(self) -> None:
        """Release the lock of a shard that failed, which the error's traceback would keep."""
        if self._iterator:
            self._iterator.close()

    def acquire(self) -> Generator[Any, None, None]:
        """Yield each missing shard while its lock is held."""
        passes = (False, True) if self.wait_for_others else (False,)
        for wait in passes:
            for number, item in enumerate(self.items):
                if self.is_missing(number):
                    name, path = self.describe(number), self.lock_path(number)
                    with hold_lock(path, name, self.job, blocking=wait) as is_ours:
                        if not is_ours:
                            continue
                        try:
                            if self.is_missing(number):
                                yield item
                        finally:
                            path.unlink(missing_ok=True)
                self.num_done = max(self.num_done, number + 1)

    def is_missing(self, number: int) -> bool:
        """Return whether a shard has to be made.

        No shard is missing once the stage is finished, because its draft folder is then gone.
        """
        paths = self.outputs[number]
        return not all(path.exists() for path in paths) and paths[0].parent.is_dir()

    def lock_path(self, number: int) -> Path:
        """Return the path of a shard's lock file."""
        return lock_path(self.stage.with_name(f"{self.stage.name}.{number:05}"))

    def describe(self, number: int) -> str:
        """Return the name of a shard for messages."""
        stage = f"{self.stage.parent.name}/{self.stage.name}"
        return f"shard {number + 1} of {len(self.items)} of {stage}"

    @property
    def num_available(self) -> int:
        """The number of missing shards that this process may make.

        With `wait_for_others` these include the shards that other processes hold, because their
        holders may die.
        """
        count = 0
        for number in range(len(self.items)):
            if self.is_missing(number):
                count += self.wait_for_others or not is_locked(self.lock_path(number))
        return count


class ShardedStage(Stage):
    """A stage that consists of shards, which several processes may make in parallel.

    A task may keep the state of a shard in a file `*.resume` in the folder of the shards. The stage
    removes such files at its end.

    Class attributes:
        label: The text before the progress.
        folder: The name of the folder that holds the shards, within the stage's folder.

    Example:
        See `pipelines.stages.capture.Capture`.
    """

    label: ClassVar[str]
    folder: ClassVar[str]

    @abstractmethod
    def list_shards(self, needs: Needs) -> Sequence[Any]:
        """Return the shards, in order."""

    @abstractmethod
    def output_paths(self, item: Any, folder: Path) -> Sequence[Path]:
        """Return the files that exist once this shard is finished."""

    @abstractmethod
    def make_task(self, needs: Needs, folder: Path) -> LightningModule:
        """Return the task whose `predict_step` makes one shard."""

    def finish(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        """Write the remaining files when all shards are finished. The default writes none."""

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / self.folder).mkdir(exist_ok=True)
        self.make_shards(needs, out, runtime, wait_for_others=True)
        for path in (out / self.folder).glob("*.resume"):  # of a run killed at the end of a shard
            path.unlink(missing_ok=True)
        self.finish(needs, out, runtime)

    def assist(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        """Make the free shards of a stage that another process runs, in the same draft."""
        self.make_shards(needs, out, runtime, wait_for_others=False)

    def make_shards(self, needs: Needs, out: Path, runtime: Runtime, wait_for_others: bool) -> None:
        """Make the shards that are missing, on as many devices as there are shards at most."""
        folder, items = out / self.folder, self.list_shards(needs)
        paths = [self.output_paths(item, folder) for item in items]
        queue = ShardQueue(items, paths, entry_path(out), runtime.job, wait_for_others)
        count = queue.num_available
        if not count:
            return
        options, devices = {}, runtime.devices.get("devices")
        if isinstance(devices, int) and devices > count:
            options["devices"] = count
        trainer = runtime.make_trainer(self.label, **options)
        try:
            task = self.make_task(needs, folder)
            trainer.predict(task, load_one_by_one(queue), return_predictions=False)
        finally:
            queue.close()


def load_one_by_one(items: Any) -> DataLoader:
    """Return a DataLoader of the items of a sequence or a Dataset, one at a time."""
    return DataLoader(items, batch_size=None, collate_fn=return_item)


def return_item(item: Any) -> Any:
    """Return `item`. A spawned process can import this function by its name."""
    return item
