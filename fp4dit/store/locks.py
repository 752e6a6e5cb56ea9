"""Locks that processes on several machines share, and that say who holds them.

The kernel frees the lock of a process that dies. On NFS the server frees the locks of a machine
that has died. On a file system without such locks, filelock uses the existence of a file instead.
There, too, the lock of a dead process on this machine is freed. If the process was on another
machine, the log of the processes that wait names the file for a person to remove.
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

from fp4dit.utils.files import read_json

log = logging.getLogger(__name__)

WAIT_SECONDS = 1.0  # time between two checks of who holds a lock

POLL_SECONDS = 0.1  # time between two attempts to acquire a lock


@dataclass(frozen=True)
class LockHolder:
    """A process that holds a lock.

    Attributes:
        host: The name of its machine.
        pid: Its process id.
        job: The name of its job, or an empty string.
        since: When it acquired the lock, in seconds since the epoch.
    """

    host: str
    pid: int
    job: str
    since: float

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        since = time.strftime("%d %b %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}"


def read_holder(lock: Path) -> LockHolder | None:
    """Return the process that says it holds a lock; None if none does.

    If the process was killed, it is still returned until another process acquires the lock.
    """
    try:
        return LockHolder(**read_json(holder_path(lock)))
    except (OSError, ValueError, TypeError):
        return None


def describe_holder(lock: Path, unknown: str = "a job") -> str:
    """Describe the process that holds a lock now; empty if none does.

    Args:
        lock: The file of the lock.
        unknown: The description of a process that could not say that it holds the lock.
    """
    return str(read_holder(lock) or unknown) if is_locked(lock) else ""


def holder_path(lock: Path) -> Path:
    """Return the path of the file in which the holder of a lock describes itself."""
    return lock.with_name(f"{lock.name}.json")


@contextmanager
def hold_lock(
    path: Path,
    purpose: str,
    job: str = "",
    on_wait: Callable[[], None] | None = None,
    blocking: bool = True,
) -> Iterator[bool]:
    """Context manager: hold a lock, and yield whether it could be acquired.

    Args:
        path: The file of the lock.
        purpose: The name of what is made under the lock, for the log of processes that wait.
        job: The name of this job, which other processes see.
        on_wait: Called about once a second while another process holds the lock.
        blocking: Wait for the lock. If false, yield false when another process holds it.
    """
    lock = FileLock(path)
    if blocking:
        wait_for_lock(lock, path, purpose, on_wait)
    elif not acquire_lock(lock, 0.0):
        yield False
        return
    try:
        with suppress(OSError):  # The disk may be full. Others can wait without knowing the holder.
            holder = LockHolder(socket.gethostname(), os.getpid(), job, time.time())
            holder_path(path).write_text(json.dumps(asdict(holder)))
        yield True
    finally:
        with suppress(OSError):
            holder_path(path).unlink()
        lock.release()


def wait_for_lock(
    lock: BaseFileLock, path: Path, purpose: str, on_wait: Callable[[], None] | None = None
) -> None:
    """Wait until this process holds a lock, and log each process that holds it meanwhile."""
    logged, timeout = None, 0.0
    while not acquire_lock(lock, timeout):
        holder = read_holder(path)
        if holder is None and timeout:  # at the first check it may not have written its file yet
            holder = "another job"
        if holder and holder != logged:
            hint = suggest_removal(lock, holder)
            log.info("waiting for %s, which makes %s%s", holder, purpose, hint)
            logged = holder
        timeout = WAIT_SECONDS
        if on_wait:
            on_wait()


def acquire_lock(lock: BaseFileLock, timeout: float) -> bool:
    """Try to acquire a lock for `timeout` seconds, and return whether this process holds it.

    On NFS, opening a lock file that another machine has just removed fails with ESTALE. No process
    holds such a lock, and the next attempt creates the file again.
    """
    try:
        lock.acquire(timeout=timeout, poll_interval=POLL_SECONDS)
    except Timeout:
        return False
    except OSError as error:
        if error.errno != errno.ESTALE:
            raise
        return False
    return True


def suggest_removal(lock: BaseFileLock, holder: LockHolder | str) -> str:
    """Return a hint for the log on how to free the lock of a dead process.

    The hint is empty if such a lock is freed automatically, or if the holder is unknown.
    """
    if not isinstance(lock, SoftFileLock) or not isinstance(holder, LockHolder):
        return ""
    if holder.host == socket.gethostname():
        return ""
    remove = f"rm {quote(os.path.abspath(lock.lock_file))}"
    return f". This file system has no locks that end with a process: if that one is dead, {remove}"


@contextmanager
def try_lock(path: Path) -> Iterator[bool]:
    """Context manager: hold a lock if no other process does, and yield whether it is held.

    Unlike `hold_lock`, it does not write a file that says who holds the lock.
    """
    lock = FileLock(path)
    if not acquire_lock(lock, 0.0):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def is_locked(path: Path) -> bool:
    """Return whether a process holds a lock now. This leaves no file behind."""
    if not path.exists():
        return False
    try:
        with try_lock(path) as acquired:
            return not acquired
    except OSError:  # the store is read-only for this process
        return read_holder(path) is not None
