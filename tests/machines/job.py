"""A job that makes one stage of units in a store, and shares them with other jobs.

It shares units as `pipelines.stages.sharded` does, but without torch, which takes minutes to import
on an emulated processor. `python -m tests.machines.job ROOT KEY SECONDS` prints each unit that it
makes.
"""

import hashlib
import logging
import socket
import sys
import time
from functools import partial
from pathlib import Path

from fp4dit.store.draft import entry_path, lock_path
from fp4dit.store.locks import hold_lock
from fp4dit.store.store import Store
from fp4dit.utils.files import atomic_write

COUNT = 12


def main(root: str, key: str, seconds: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    store, work = (
        Store(Path(root), socket.gethostname()),
        partial(make_units, seconds=float(seconds)),
    )
    store.get_or_make("stage", key, partial(work, patient=True), {}, partial(work, patient=False))


def make_units(draft: Path, seconds: float, patient: bool) -> None:
    """Make the missing units that no other process makes.

    A patient process then waits for the others' units, and makes those whose process has died.
    """
    for blocking in (False, True)[: 1 + patient]:
        for number in range(COUNT):
            if is_missing(draft, number):
                make_unit(draft, number, seconds, blocking)


def make_unit(draft: Path, number: int, seconds: float, blocking: bool) -> None:
    """Make a unit under its lock, if the lock is free or once it is."""
    stage = entry_path(draft)
    lock = lock_path(stage.with_name(f"{stage.name}.{number:02}"))
    with hold_lock(lock, f"unit {number}", blocking=blocking) as is_holder:
        if is_holder and is_missing(draft, number):
            time.sleep(seconds)
            with atomic_write(unit_path(draft, number)) as part:
                part.write_bytes(unit_content(number))
            print(f"made {number}", flush=True)
        if is_holder:
            lock.unlink(missing_ok=True)


def unit_path(draft: Path, number: int) -> Path:
    """Return the file of a unit."""
    return draft / f"{number:02}.bin"


def is_missing(draft: Path, number: int) -> bool:
    """Return True if a unit is missing in a draft that still exists."""
    return not unit_path(draft, number).exists() and draft.is_dir()


def unit_content(number: int) -> bytes:
    """Return the bytes of a unit."""
    return hashlib.sha512(b"%d" % number).digest() * 400


if __name__ == "__main__":
    main(*sys.argv[1:])
