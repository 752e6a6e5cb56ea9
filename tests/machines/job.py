"""What a job does with a store, without torch, which an emulated processor takes minutes to import: one stage of units,
of which those that wait take some, as `pipelines.parted` has it.

`python -m tests.machines.job ROOT KEY SECONDS` says each unit that it makes.
"""

import hashlib
import logging
import socket
import sys
import time
from functools import partial
from pathlib import Path

from fp4dit.locks import locked
from fp4dit.store import Store, finished, lock, whole

COUNT = 12


def main(root: str, key: str, seconds: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    store, work = Store(Path(root), socket.gethostname()), partial(make, seconds=float(seconds))
    store.get("stage", key, partial(work, patient=True), {}, partial(work, patient=False))


def make(draft: Path, seconds: float, patient: bool) -> None:
    stage = finished(draft)
    for attempt in (False, True)[: 1 + patient]:
        for number in range(COUNT):
            place, unit = lock(stage.with_name(f"{stage.name}.{number:02}")), draft / f"{number:02}.bin"
            lacks = lambda unit=unit: not unit.exists() and draft.is_dir()
            if lacks():
                with locked(place, f"unit {number}", patient=attempt) as mine:
                    if mine and lacks():
                        time.sleep(seconds)
                        with whole(unit) as part:
                            part.write_bytes(content(number))
                        print(f"made {number}", flush=True)
                    if mine:
                        place.unlink(missing_ok=True)


def content(number: int) -> bytes:
    return hashlib.sha512(b"%d" % number).digest() * 400


if __name__ == "__main__":
    main(*sys.argv[1:])
