"""Stages of parts, which all processes that want them make side by side, on one machine or on many."""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from lightning import LightningModule
from torch.utils.data import DataLoader, IterableDataset

from fp4dit.locks import held, locked
from fp4dit.store import finished, lock
from pipelines.runtime import Runtime

Needs = Mapping[str, Path]


@dataclass
class Parts(IterableDataset[Any]):
    """Those that are not made yet, each for one process alone; `made` are the files that each leaves.

    They are taken in order, `passed` is how many have been. Who is `patient` waits in the end for what others have
    taken, and makes what those leave unmade who die. The lock of a part has the name of its stage's with a number.
    """

    items: Sequence[Any]
    made: Sequence[Sequence[Path]]
    stage: Path
    job: str
    patient: bool
    passed: int = 0
    walk: Generator[Any, None, None] | None = None

    def __len__(self) -> int:
        """One too many: without a length Lightning asks for the next one before this one is made, and with the right
        one it does not come back after the last, whose lock would stay."""
        return len(self.items) + 1

    def __iter__(self) -> Iterator[Any]:
        self.walk = self.taken()
        return self.walk

    def close(self) -> None:
        """Leaves the part that could not be made, whose lock an error's traceback would hold."""
        if self.walk:
            self.walk.close()

    def taken(self) -> Generator[Any, None, None]:
        for patient in (False, True)[: 1 + self.patient]:
            for number, item in enumerate(self.items):
                if self.lacks(number):
                    with locked(self.lock(number), self.name(number), self.job, patient=patient) as mine:
                        if not mine:
                            continue
                        try:
                            if self.lacks(number):
                                yield item
                        finally:
                            self.lock(number).unlink(missing_ok=True)
                self.passed = max(self.passed, number + 1)

    def lacks(self, number: int) -> bool:
        """Whether it is to be made; of a stage that was finished meanwhile nothing is, for its draft is gone."""
        paths = self.made[number]
        return not all(path.exists() for path in paths) and paths[0].parent.is_dir()

    def lock(self, number: int) -> Path:
        return lock(self.stage.with_name(f"{self.stage.name}.{number:05}"))

    def name(self, number: int) -> str:
        return f"part {number + 1} of {len(self.items)} of {self.stage.parent.name}/{self.stage.name}"

    @property
    def open(self) -> int:
        """How many there are to make, of which others have taken none."""
        return sum(self.lacks(i) and (self.patient or not held(self.lock(i))) for i in range(len(self.items)))


class Parted(Protocol):
    """`label` is what progress shows, `folder` where the parts are put."""

    label: ClassVar[str]
    folder: ClassVar[str]

    def items(self, needs: Needs) -> Sequence[Any]: ...
    def files(self, item: Any, folder: Path) -> Sequence[Path]:
        """What there is once this one is made."""
        ...

    def task(self, needs: Needs, folder: Path) -> LightningModule:
        """Makes one part with each `predict_step`."""
        ...

    def finish(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        """What remains to do when all parts are there."""

    def run(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        (out / self.folder).mkdir(exist_ok=True)
        self.make(needs, out, runtime, patient=True)
        self.finish(needs, out, runtime)

    def help(self, needs: Needs, out: Path, runtime: Runtime) -> None:
        """Make what nobody has taken of the parts of a stage that another process runs, in the same draft."""
        self.make(needs, out, runtime, patient=False)

    def make(self, needs: Needs, out: Path, runtime: Runtime, patient: bool) -> None:
        folder, items = out / self.folder, self.items(needs)
        parts = Parts(items, [self.files(item, folder) for item in items], finished(out), runtime.job, patient)
        if count := parts.open:
            devices = runtime.devices.get("devices")
            fewer = {"devices": count} if isinstance(devices, int) and devices > count else {}
            trainer = runtime.trainer(self.label, **fewer)
            try:
                trainer.predict(self.task(needs, folder), one_by_one(parts), return_predictions=False)
            finally:
                parts.close()


def one_by_one(items: Any) -> DataLoader:
    """What is in `items`, a sequence or a Dataset, one at a time."""
    return DataLoader(items, batch_size=None, collate_fn=as_it_is)


def as_it_is(item: Any) -> Any:  # by name, for a process that is spawned to know it
    return item
