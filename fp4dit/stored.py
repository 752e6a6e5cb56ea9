"""What lies in a store's folder, seen from outside: finished entries, drafts, and what dead jobs left."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4dit.store import lock, read_manifest

KEY = re.compile(r"[0-9a-f]{16}")
PASSING = re.compile(r"(\d{5,}\.)?lock(\.json)?|draft\.json")
ABANDONED = 3600.0  # seconds after which nobody is still writing a small file


@dataclass(frozen=True)
class Stored:
    """A finished folder, or the draft of one that a job fills or has died filling."""

    stage: str
    key: str
    path: Path

    @property
    def name(self) -> str:
        return f"{self.stage}/{self.key}"

    @property
    def is_draft(self) -> bool:
        return self.path.name != self.key

    @property
    def lock(self) -> Path:
        return lock(self.path.with_name(self.key))

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Empty for a draft, and for one that cannot be read."""
        try:
            return {} if self.is_draft else read_manifest(self.path)
        except (OSError, ValueError, AttributeError):
            return {}


def contents(root: Path) -> list[Stored]:
    """By stage, and then by when they were made."""
    stages = sorted(path for path in root.glob("[!.]*") if path.is_dir())
    return [one for stage in stages for one in sorted(within(stage), key=lambda one: one.path.stat().st_mtime)]


def within(stage: Path) -> Iterator[Stored]:
    for path in stage.iterdir():
        key, _, rest = path.name.partition(".")
        if path.is_dir() and KEY.fullmatch(key) and rest in ("", "draft"):
            yield Stored(stage.name, key, path)


def leftovers(root: Path) -> Iterator[tuple[Path, str]]:
    """Files that are of use only while a job runs, and the key they belong to, if any: locks, who held them, when a
    draft was begun, and what was being written."""
    yield from ((path, "") for path in root.glob(".*.part") if time.time() - path.stat().st_mtime > ABANDONED)
    for path in root.glob("[!.]*/*"):
        key, _, rest = path.name.partition(".")
        if path.is_file() and KEY.fullmatch(key) and PASSING.fullmatch(rest):
            yield path, key
