"""Stages for drills, and what has to hold of a store whatever happened to it."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import lightning as L

from fp4dit.store import Store, published
from fp4dit.stored import contents
from pipelines.parted import Parted
from pipelines.runtime import Runtime


@dataclass(frozen=True)
class Units:
    """`count` units, each of which depends on all that the stage needs, and is not made again if it is there."""

    seed: int
    count: int

    def run(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        say(f"{out.name.partition('.')[0]}\n")
        before = b"".join(read(needs[role]) for role in sorted(needs))
        for i in range(self.count):
            path = out / "units" / f"{i:03}.bin"
            if not path.exists():
                time.sleep(float(os.environ.get("DRILL_SECONDS", "0.01")))
                data = hashlib.sha512(b"%d %d " % (self.seed, i) + before).digest() * 400
                with published(path) as part:
                    part.write_bytes(data)


@dataclass(frozen=True)
class Shared(Parted):
    """The same of `count` parts, which several processes may make."""

    seed: int
    count: int
    label = "drill"
    folder = "units"

    def items(self, needs: Mapping[str, Path]) -> list[int]:
        return list(range(self.count))

    def files(self, item: int, folder: Path) -> list[Path]:
        return [folder / f"{item:03}.bin"]

    def task(self, needs: Mapping[str, Path], folder: Path) -> L.LightningModule:
        return Write(self, b"%d " % self.seed + b"".join(read(needs[role]) for role in sorted(needs)), folder)

    def finish(self, needs: Mapping[str, Path], out: Path, runtime: Runtime) -> None:
        (out / "found.json").write_text(json.dumps(len(list((out / self.folder).glob("*.bin")))))


class Write(L.LightningModule):
    def __init__(self, stage: Shared, before: bytes, folder: Path) -> None:
        super().__init__()
        self.stage, self.before, self.folder = stage, before, folder

    def predict_step(self, item: int) -> None:
        time.sleep(float(os.environ.get("DRILL_SECONDS", "0.01")))
        [path] = self.stage.files(item, self.folder)
        with published(path) as part:
            part.write_bytes(hashlib.sha512(b"%d " % item + self.before).digest() * 400)
        name = self.folder.parent.name.partition(".")[0]
        say(f"{os.environ.get('SLURM_PROCID', os.getpid())} {name}/{item}\n")


def say(line: str) -> None:
    """Appends to what is counted, which all processes share."""
    if "DRILL_LOG" in os.environ:
        with open(os.environ["DRILL_LOG"], "a") as file:
            file.write(line)


def read(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("units/*.bin")))


def results(root: Path) -> dict[str, bytes]:
    """Every file of every finished entry but the manifests, which say when."""
    return {
        f"{one.name}/{path.relative_to(one.path)}": path.read_bytes()
        for one in contents(root)
        if not one.is_draft
        for path in one.path.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


def units(root: Path) -> dict[str, tuple[int, int]]:
    """Every unit that is published, in an entry or a draft: which file it is, and when it was written."""
    found = {}
    for one in contents(root):
        for path in one.path.glob("*/*"):
            # A unit of weights is there once its report is.
            if path.suffix in (".bin", ".json", ".png", *([".safetensors"] if path.parent.name != "units" else [])):
                stat = path.stat()
                found[f"{one.name}/{path.name}"] = (stat.st_ino, stat.st_mtime_ns)
    return found


def check(root: Path, before: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The units that there are, after seeing that all that were there still are what they were, and that what has the
    name of something finished is finished."""
    now = units(root)
    again = [name for name, state in before.items() if now.get(name) != state]
    assert again == []
    for one in contents(root):
        if not one.is_draft:
            assert Store(root).damaged(one.path) == [], one.name
    return now
