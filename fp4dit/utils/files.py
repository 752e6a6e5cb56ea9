"""Atomic writes, checksums, and JSON and CSV files."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager: yield a temporary path, and give the file its name when it is complete.

    If the block fails, the temporary file is removed, and `path` stays what it was.

    Example:
        >>> with atomic_write(Path("sizes.json")) as part:
        ...     part.write_text("{}")
    """
    # The process id is in the name because another process may be writing the same file.
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_write_checksummed(path: Path) -> Iterator[Path]:
    """Context manager: write a file of a draft atomically, with its checksum in a file beside it.

    The next run of a draft keeps the files that have the right checksum.
    """
    with atomic_write(path) as part:
        yield part
        with atomic_write(checksum_path(path)) as checksum:
            checksum.write_text(file_sha256(part))


def checksum_path(path: Path | str) -> Path:
    """Return the file that contains the checksum of a draft's file."""
    return Path(f"{path}.sha256")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def write_json(path: Path, value: Any) -> None:
    """Write a value to a JSON file, with one line for each item."""
    path.write_text(json.dumps(value, indent=1))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows to a CSV file, with the keys of the first row as header."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0] if rows else ())
        writer.writeheader()
        writer.writerows(rows)
