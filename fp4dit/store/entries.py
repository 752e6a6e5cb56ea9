"""Contents of a store's folder: finished entries, drafts, and files that ended jobs left."""

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp4dit.store.draft import lock_path
from fp4dit.store.manifest import read_manifest

KEY = re.compile(r"[0-9a-f]{16}")

# Suffixes of the files beside an entry: locks of the entry and of its shards, files that say who
# holds a lock, and the journal of a draft.
JOB_FILE_SUFFIX = re.compile(r"(\d{5,}\.)?lock(\.json)?|draft\.json")

# A temporary file of a cache that has not changed for this time belongs to a process that ended.
ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True)
class StoreEntry:
    """A finished entry, or a draft.

    Attributes:
        stage: Name of the stage.
        key: Key of the entry.
        path: Its folder.

    Example:
        >>> path = Path("outputs/store/score/0123456789abcdef.draft")
        >>> entry = StoreEntry("score", "0123456789abcdef", path)
        >>> entry.name, entry.is_draft
        ('score/0123456789abcdef', True)
    """

    stage: str
    key: str
    path: Path

    @property
    def name(self) -> str:
        """Name of the entry, `stage/key`."""
        return f"{self.stage}/{self.key}"

    @property
    def is_draft(self) -> bool:
        return self.path.name != self.key

    @property
    def lock_path(self) -> Path:
        return lock_path(self.path.with_name(self.key))

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def manifest(self) -> Mapping[str, Any]:
        """Manifest of the entry; empty for a draft, or if the manifest cannot be read."""
        try:
            return {} if self.is_draft else read_manifest(self.path)
        except (OSError, ValueError, AttributeError):
            return {}


def list_entries(root: Path) -> list[StoreEntry]:
    """Return the entries and drafts of a store, by stage and then by the time they were made."""
    entries = []
    for stage in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        entries += sorted(iter_stage_entries(stage), key=lambda entry: entry.path.stat().st_mtime)
    return entries


def iter_stage_entries(stage: Path) -> Iterator[StoreEntry]:
    """Yield the entries and drafts in the folder of a stage."""
    for path in stage.iterdir():
        key, _, suffix = path.name.partition(".")
        if path.is_dir() and KEY.fullmatch(key) and suffix in ("", "draft"):
            yield StoreEntry(stage.name, key, path)


def iter_leftovers(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the files that are needed only while a job runs, each with the key of its entry.

    These are locks, files that say who holds a lock, and journals of drafts. Temporary files of
    caches that were never finished have an empty key.
    """
    for path in root.glob(".*.part"):
        if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
            yield path, ""
    for path in root.glob("[!.]*/*"):
        key, _, suffix = path.name.partition(".")
        if path.is_file() and KEY.fullmatch(key) and JOB_FILE_SUFFIX.fullmatch(suffix):
            yield path, key
