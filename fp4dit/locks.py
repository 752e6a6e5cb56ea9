"""Locks that processes of several machines share, and that say who holds them.

The kernel frees the lock of a process that dies, also on NFS, where a server frees those of a machine that is gone. On
a file system without such locks, filelock makes do with a file's existence: who died on this machine is replaced there
too, who died on another is not, but named to those who wait, with the file that they may have to remove.
"""

import errno
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

log = logging.getLogger(__name__)

LOOK = 1.0  # seconds between looks at who holds a lock that is waited for
POLL = 0.1


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock; `since` is in seconds since the epoch."""

    host: str
    pid: int
    job: str
    since: float

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        since = time.strftime("%d %b %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"


def holder(lock: Path) -> Holder | None:
    """Who says that it holds the lock. After a kill this is the dead one, until the next one has the lock."""
    try:
        return Holder(**json.loads(note(lock).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def note(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.json")


@contextmanager
def locked(
    path: Path, what: str, job: str = "", meanwhile: Callable[[], None] | None = None, patient: bool = True
) -> Iterator[bool]:
    """Waits until this process alone holds the lock of this name, says for whom, who makes `what`, and does what there
    is to do `meanwhile`. Who is not patient is told at once whether it is theirs."""
    lock = FileLock(path)
    if patient:
        wait(lock, path, what, meanwhile)
    elif not taken(lock, 0.0):
        yield False
        return
    try:
        with suppress(OSError):  # a full disk: others wait as well without
            mine = Holder(socket.gethostname(), os.getpid(), job, time.time())
            note(path).write_text(json.dumps(asdict(mine)))
        yield True
    finally:
        with suppress(OSError):
            note(path).unlink()
        lock.release()


def wait(lock: BaseFileLock, path: Path, what: str, meanwhile: Callable[[], None] | None = None) -> None:
    told, patience = None, 0.0
    while not taken(lock, patience):
        who = holder(path) or ("another job" if patience else None)  # which may be about to say who it is
        if who and who != told:
            log.info("waiting for %s, which makes %s%s", who, what, advice(lock, who))
            told = who
        patience = LOOK
        if meanwhile:
            meanwhile()


def taken(lock: BaseFileLock, patience: float) -> bool:
    """Whether the lock is ours after so many seconds. On NFS the file of one that another machine has just removed is
    stale: that one is nobody's, and the next attempt makes it anew."""
    try:
        lock.acquire(timeout=patience, poll_interval=POLL)
    except Timeout:
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False
    return True


def advice(lock: BaseFileLock, who: Holder | str) -> str:
    """What to do where nothing here can tell that a holder is dead."""
    if not isinstance(lock, SoftFileLock) or not isinstance(who, Holder) or who.host == socket.gethostname():
        return ""
    remove = f"rm {quote(os.path.abspath(lock.lock_file))}"
    return f". This file system has no locks that end with a process: if that one is dead, {remove}"


@contextmanager
def free(path: Path) -> Iterator[bool]:
    """Whether nobody holds the lock of this name. If so nobody else does inside the block."""
    lock = FileLock(path)
    if not taken(lock, 0.0):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def held(path: Path) -> bool:
    """Whether somebody holds the lock of this name now. Leaves no file behind."""
    if not path.exists():
        return False
    try:
        with free(path) as nobody:
            return not nobody
    except OSError:  # of a store that we may only read
        return holder(path) is not None
