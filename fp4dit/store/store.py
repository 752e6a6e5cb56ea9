"""A content-addressed store: the result of a stage lies in a folder named by its identity's hash.

A process fills the folder of an entry as a draft, under a lock, and renames it when it is finished.
A folder with the name of an entry is therefore always complete. A killed run leaves its draft,
which the next run continues.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fp4dit.store.draft import (
    draft_path,
    journal_path,
    lock_path,
    seconds_spent,
    write_journal,
)
from fp4dit.store.locks import hold_lock
from fp4dit.store.manifest import manifest_digest, read_manifest
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, checksum_path, file_sha256
from fp4dit.utils.provenance import read_git_commit, read_package_versions

log = logging.getLogger(__name__)

# The names of temporary files: of `atomic_write`, and of safetensors, which renames its own to it.
TEMPORARY_FILES = ("*.part", ".tmp*")


class Store:
    """A folder of results, which processes on several machines may share.

    Args:
        root: The folder, which need not exist.
        job: The name of this job in the log of processes that wait for it.

    Example:
        >>> store = Store(Path("outputs/store"), "demo_4")
        >>> out = store.get_or_make("capture", key, make, {"needs": {}, "config": config})
        >>> store.find_entry("capture", key) == out
        True
    """

    def __init__(self, root: Path, job: str = "") -> None:
        self.root, self.job = root, job
        # The size and mtime that each file had when its checksum was verified.
        self.verified: dict[Path, tuple[int, int]] = {}
        self.reported: set[Path] = set()  # damaged entries that were logged
        self.no_assist: set[Path] = set()  # entries at which assisting failed

    def get_path(self, stage: str, key: str) -> Path:
        """Return the folder of an entry, which need not exist."""
        return self.root / stage / key

    def find_entry(self, stage: str, key: str, *files: str) -> Path | None:
        """Return the folder of an entry if it is finished and intact.

        Args:
            stage: The name of the stage.
            key: The key of the entry.
            *files: The files that have to be intact; all files if none is named.
        """
        out = self.get_path(stage, key)
        if not out.exists():
            return None
        damaged = self.find_damaged_files(out, files)
        if damaged and out not in self.reported:
            self.reported.add(out)
            log.warning("%s is damaged (%s) and will be made again", out, ", ".join(damaged[:3]))
        return None if damaged else out

    def read_seconds(self, stage: str, key: str) -> float | None:
        """Return the seconds that it took to make an entry; None if there is no entry."""
        try:
            return float(read_manifest(self.get_path(stage, key))["seconds"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def get_or_make(
        self,
        stage: str,
        key: str,
        make: Callable[[Path], None],
        manifest: Mapping[str, Any],
        assist: Callable[[Path], None] | None = None,
    ) -> Path:
        """Return the folder of an entry, which is made if it is missing or damaged.

        Of several jobs that need an entry, one makes it while the others wait.

        Args:
            stage: The name of the stage.
            key: The key of the entry.
            make: Fills the draft, which holds the files that a killed run has finished.
            manifest: What the manifest says of the entry's identity: `needs` and `config`.
            assist: Does a part of another job's work on the draft. It is called repeatedly while
                this job waits.
        """
        out = self.get_path(stage, key)
        out.parent.mkdir(parents=True, exist_ok=True)
        on_wait = assist and (lambda: self.try_assist(out, assist))
        with hold_lock(lock_path(out), f"{stage}/{key}", self.job, on_wait):
            if self.find_entry(stage, key) is None:
                self._make_entry(stage, key, make, manifest)
        return out

    def _make_entry(
        self, stage: str, key: str, make: Callable[[Path], None], manifest: Mapping[str, Any]
    ) -> None:
        """Make an entry that is missing or damaged. This process holds its lock."""
        out = self.get_path(stage, key)
        # Only the damaged files of a damaged entry are made again, so the time is added to the
        # seconds that its manifest has.
        seconds_before = self.read_seconds(stage, key)
        draft = self.open_draft(out)
        if seconds_before is None:
            seconds_before = seconds_spent(draft)
        write_journal(draft, seconds_before, manifest.get("needs", {}))
        start = time.monotonic()  # unlike time.time(), it is not affected by changes of the clock
        make(draft)
        seconds = round(seconds_before + time.monotonic() - start, 2)
        self.finish_draft(draft, {"stage": stage, **manifest, "seconds": seconds})
        draft.rename(out)
        journal_path(draft).unlink(missing_ok=True)

    def try_assist(self, out: Path, assist: Callable[[Path], None]) -> None:
        """Assist with the draft of an entry. Errors are logged, because waiting alone still works.

        Args:
            out: The folder of the entry.
            assist: Does a part of the work, given the draft.
        """
        if out in self.no_assist or not draft_path(out).is_dir():
            return
        try:
            assist(draft_path(out))
        except Exception as error:
            self.no_assist.add(out)
            log.warning(
                "could not assist with %s/%s (%s); waiting for its job",
                out.parent.name,
                out.name,
                error,
            )

    def open_draft(self, out: Path) -> Path:
        """Return the draft of an entry, with intact files of a damaged entry or a killed run."""
        draft = draft_path(out)
        if out.exists():
            shutil.rmtree(draft, ignore_errors=True)
            out.rename(draft)
        draft.mkdir(exist_ok=True)
        # A run that was killed before it renamed the folder leaves a manifest too.
        if (draft / "manifest.json").exists():
            for name in [*self.find_damaged_files(draft), "manifest.json"]:
                (draft / name).unlink(missing_ok=True)
        for checksum in draft.rglob(checksum_path("*").name):
            path = checksum.with_suffix("")
            if path.exists() and file_sha256(path) != checksum.read_text():
                log.warning("%s is not what was written, and will be made again", path)
                path.unlink()
        return draft

    def finish_draft(self, draft: Path, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a complete draft, with the checksums of its files.

        Raises:
            UserError: if a file is not what was written to it.
        """
        # Temporary files of killed processes are removed only now, because processes that assist
        # write such files while the draft is filled.
        for pattern in TEMPORARY_FILES:
            for path in draft.rglob(pattern):
                path.unlink()
        checksums = set(draft.rglob(checksum_path("*").name))
        paths = {path for path in draft.rglob("*") if path.is_file()}
        files = {}
        for path in sorted(paths.difference(checksums)):
            digest = file_sha256(path)
            name = path.relative_to(draft).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
            if checksum_path(path) in checksums and checksum_path(path).read_text() != digest:
                raise UserError(
                    f"{path} is not what was written: is the disk sound? The same command makes it "
                    "again"
                )
        values = {
            **manifest,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "git_commit": read_git_commit(),
            "versions": read_package_versions(),
            "files": files,
        }
        values["sha256"] = manifest_digest(values)
        with atomic_write(draft / "manifest.json") as part:
            part.write_text(json.dumps(values, indent=2) + "\n")
        for checksum in checksums:
            checksum.unlink()

    def find_damaged_files(self, out: Path, names: Sequence[str] = ()) -> list[str]:
        """Return the files of an entry that are missing or differ from what its manifest says.

        Each file is read once per process, unless its size or mtime changes.

        Args:
            out: The folder of the entry.
            names: The files to check; all files if none is named.
        """
        try:
            files = read_manifest(out)["files"]
        except PermissionError:  # the entry may be intact
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return ["manifest.json"]
        if names:
            files = {name: files[name] for name in names if name in files}
        return [name for name, record in files.items() if not self.is_intact(out / name, record)]

    def is_intact(self, path: Path, record: Mapping[str, Any]) -> bool:
        """Return whether a file has the size and the checksum of its record in the manifest."""
        if not path.is_file():
            return False
        stat = path.stat()
        state = (stat.st_size, stat.st_mtime_ns)
        if self.verified.get(path) != state:
            if stat.st_size != record["bytes"] or file_sha256(path) != record["sha256"]:
                return False
            self.verified[path] = state
        return True
