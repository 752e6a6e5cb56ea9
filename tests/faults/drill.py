"""Stages for drills, and the checks of a store after a fault."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L

from fp4dit.store.entries import list_entries
from fp4dit.store.store import Store
from fp4dit.utils.files import atomic_write_checksummed
from pipelines.runtime.trainer import Runtime
from pipelines.stages.base import Stage
from pipelines.stages.sharded import ShardedStage
from tests.helpers.waiting import wait_until


@dataclass(frozen=True)
class Units(Stage):
    """A stage of `count` units, whose bytes depend on all inputs of the stage.

    A unit that exists is not made again.
    """

    seed: int
    count: int

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        append_log(f"{out.name.partition('.')[0]}\n")
        inputs = b"".join(read_units(needs[role]) for role in sorted(needs))
        for i in range(self.count):
            path = out / "units" / f"{i:03}.bin"
            if not path.exists():
                wait_at(f"{out.parent.name}/{i}")
                time.sleep(float(os.environ.get("DRILL_SECONDS", "0.01")))
                data = hashlib.sha512(b"%d %d " % (self.seed, i) + inputs).digest() * 400
                with atomic_write_checksummed(path) as part:
                    part.write_bytes(data)


@dataclass(frozen=True)
class Shared(ShardedStage):
    """The same stage with `count` shards, which several processes may make."""

    seed: int
    count: int
    label = "drill"
    folder = "units"

    def list_shards(self, needs: Mapping[str, Path]) -> list[int]:
        return list(range(self.count))

    def output_paths(self, item: int, folder: Path) -> list[Path]:
        return [folder / f"{item:03}.bin"]

    def make_task(self, needs: Mapping[str, Path], folder: Path) -> L.LightningModule:
        inputs = b"".join(read_units(needs[role]) for role in sorted(needs))
        return WriteShard(self, b"%d " % self.seed + inputs, folder)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        (out / "count.json").write_text(json.dumps(len(list((out / self.folder).glob("*.bin")))))


class WriteShard(L.LightningModule):
    """Write the shards of a stage."""

    def __init__(self, stage: Shared, inputs: bytes, folder: Path) -> None:
        super().__init__()
        self.stage, self.inputs, self.folder = stage, inputs, folder

    def predict_step(self, item: int) -> None:
        wait_at(f"{self.folder.parent.parent.name}/any")
        time.sleep(float(os.environ.get("DRILL_SECONDS", "0.01")))
        [path] = self.stage.output_paths(item, self.folder)
        with atomic_write_checksummed(path) as part:
            part.write_bytes(hashlib.sha512(b"%d " % item + self.inputs).digest() * 400)
        name = self.folder.parent.name.partition(".")[0]
        append_log(f"{os.environ.get('SLURM_PROCID', os.getpid())} {name}/{item}\n")


def wait_at(point: str) -> None:
    """Wait at a point of a stage as long as the file `$DRILL_HOLD` names that point.

    The points are STAGE/UNIT, before a unit, and STAGE/any, before any shard. A test thus kills a
    process at a known point however slow the machine is. Each process that waits leaves a file.
    """
    hold = Path(os.environ.get("DRILL_HOLD", "/nonexistent"))
    if not hold.exists() or hold.read_text() != point:
        return
    hold.with_name(f"{hold.name}.{os.getpid()}").touch()
    wait_until(lambda: not hold.exists())


def append_log(line: str) -> None:
    """Append a line to the log that all processes share."""
    if "DRILL_LOG" in os.environ:
        with open(os.environ["DRILL_LOG"], "a") as file:
            file.write(line)


def read_units(folder: Path) -> bytes:
    """Return the bytes of all units of an entry."""
    return b"".join(path.read_bytes() for path in sorted(folder.glob("units/*.bin")))


def results(root: Path) -> dict[str, bytes]:
    """Return every file of every finished entry but the manifests, which hold times."""
    contents = {}
    for entry in list_entries(root):
        if entry.is_draft:
            continue
        for path in entry.path.rglob("*"):
            if path.is_file() and path.name != "manifest.json":
                contents[f"{entry.name}/{path.relative_to(entry.path)}"] = path.read_bytes()
    return contents


def units(root: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and the time of every finished unit, in entries and in drafts."""
    states = {}
    for entry in list_entries(root):
        for path in entry.path.glob("*/*"):
            suffixes = {".bin", ".json", ".png", ".safetensors"}
            if path.parent.name == "units":
                suffixes.remove(".safetensors")  # a unit of weights exists once its report does
            if path.suffix in suffixes:
                stat = path.stat()
                states[f"{entry.name}/{path.name}"] = (stat.st_ino, stat.st_mtime_ns)
    return states


def count_files(root: Path) -> int:
    """Return the number of files, while processes may create and rename folders."""
    return sum(len(names) for _, _, names in os.walk(root))


def check(root: Path, before: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Check that the units of `before` are unchanged and that finished entries are intact.

    Returns:
        The units that exist now.
    """
    now = units(root)
    changed = [name for name, state in before.items() if now.get(name) != state]
    assert changed == []
    for entry in list_entries(root):
        if not entry.is_draft:
            assert Store(root).find_damaged_files(entry.path) == [], entry.name
    return now
