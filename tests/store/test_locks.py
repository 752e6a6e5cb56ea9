"""Locks between real processes: one holder at a time, and a dead holder is replaced."""

import errno
import fcntl
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from select import select

import pytest

from fp4dit.store.locks import describe_holder, hold_lock, read_holder, try_lock
from tests.helpers.waiting import PATIENCE, wait_until

# A process that holds a lock until its input ends. It prints what it logs.
HOLD = """
import logging, sys
from pathlib import Path
from fp4dit.store.locks import hold_lock

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with hold_lock(Path(sys.argv[1]), "capture/abc", "demo_4"):
    print("mine", flush=True)
    sys.stdin.read()
"""
SOFT = """
import errno, fcntl
def without(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = without
"""
ELSEWHERE = """
import socket
socket.gethostname = lambda: "elsewhere"
"""


def start(path: Path, code: str = HOLD) -> subprocess.Popen:
    """Start a process that waits for a lock, and then holds it until its input is closed."""
    command = [sys.executable, "-W", "ignore", "-c", code, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, bufsize=0, **pipes)


def read_line(process: subprocess.Popen) -> bytes:
    """Return the next line that a process prints."""
    ready, _, _ = select([process.stdout], [], [], PATIENCE)
    assert ready
    return process.stdout.readline()


def hold(path: Path, code: str = HOLD) -> subprocess.Popen:
    """Start a process, and return it once it holds a lock."""
    process = start(path, code)
    assert read_line(process) == b"mine\n"
    return process


def test_waiting_logs_the_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path) as process:
        with try_lock(path) as nobody:
            assert not nobody
        with hold_lock(path, "capture/abc", on_wait=process.stdin.close):
            assert process.wait(PATIENCE) == 0
    [told] = [record.message for record in caplog.records]
    who = f"process {process.pid} on {re.escape(socket.gethostname())}"
    assert re.fullmatch(
        rf"waiting for {who} \(demo_4\), since \d\d \w+ \d\d:\d\d:\d\d, which makes capture/abc",
        told,
    )
    assert [p.name for p in tmp_path.iterdir()] == ["abc.lock"]
    with try_lock(path) as nobody:
        assert nobody


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [HOLD, SOFT + HOLD], ids=["flock", "by existence"])
def test_a_killed_holder_is_replaced_while_one_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: str
):
    """This holds also on a file system without locks, where only the existence of a file counts."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path, code) as process:
        if code != HOLD:
            monkeypatch.setattr(fcntl, "flock", refuse)
        waiting = start(path, code)
        assert read_line(waiting).startswith(b"waiting for process %d on" % process.pid)
        os.kill(process.pid, signal.SIGKILL)
    known = read_holder(path)
    assert known
    assert known.pid in (process.pid, waiting.pid)
    assert waiting.communicate(timeout=PATIENCE)[0] == b"mine\n"
    with hold_lock(path, "capture/abc"):
        mine = read_holder(path)
        assert mine
        assert mine.pid == os.getpid()
    assert read_holder(path) is None


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_waiting_without_file_locks_says_what_to_remove(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Without file locks, a process that waits for another machine logs which file to remove, and
    continues once it is removed. A dead process of the same machine would be replaced.
    """
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "a b.lock"
    with hold(path, SOFT + ELSEWHERE + HOLD) as process:
        process.kill()
    waiting = threading.Thread(
        target=lambda: hold_lock(path, "capture/abc").__enter__(), daemon=True
    )
    waiting.start()
    wait_until(lambda: caplog.records)
    [told] = [record.message for record in caplog.records]
    assert f"waiting for process {process.pid} on elsewhere (demo_4), since " in told
    assert "if that one is dead, rm " in told
    subprocess.run(told[told.index("rm ") :], shell=True, check=True)
    waiting.join(PATIENCE)
    assert not waiting.is_alive()


def test_a_stale_lock_file_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """NFS answers ESTALE about a file that another machine removed; the lock is requested again."""
    flock, answers = fcntl.flock, iter([errno.ESTALE, errno.ESTALE])

    def stale(*given: int) -> None:
        if number := next(answers, None):
            raise OSError(number, "Stale file handle")
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", stale)
    path = tmp_path / "abc.lock"
    with try_lock(path) as nobody:
        assert not nobody
    with hold_lock(path, "capture/abc") as mine:
        assert mine
        with hold_lock(path, "capture/abc", blocking=False) as again:
            assert not again


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_waiting_for_an_unknown_holder(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path) as process:
        path.with_name("abc.lock.json").write_text('{"host": ')
        release_once_logged = lambda: caplog.records and process.stdin.close()
        with hold_lock(path, "capture/abc", on_wait=release_once_logged):
            pass
    assert [record.message for record in caplog.records] == [
        "waiting for another job, which makes capture/abc"
    ]


def test_a_holder_is_described_while_it_holds_the_lock(tmp_path: Path):
    """A holder whose file could not be written, as on a full disk, still holds the lock."""
    path = tmp_path / "abc.lock"
    assert describe_holder(path) == ""
    with hold_lock(path, "capture/abc", "demo_4"):
        described = path.with_name("abc.lock.json").read_text()
        assert describe_holder(path).startswith(f"process {os.getpid()} on ")
        path.with_name("abc.lock.json").unlink()
        assert describe_holder(path) == "a job"
        assert describe_holder(path, unknown="another job") == "another job"
    path.with_name("abc.lock.json").write_text(described)  # as of a killed process
    assert describe_holder(path) == ""


def test_a_lock_removed_while_others_wait_has_one_holder(tmp_path: Path):
    """Garbage collection of the store removes lock files while it holds them."""
    path, count = tmp_path / "abc.lock", tmp_path / "count"
    count.write_text("0")
    # Two holders at once would read the same number.
    increment = "n = int(count.read_text()); time.sleep(0.02); count.write_text(str(n + 1))"
    add = HOLD.replace("sys.stdin.read()", increment)
    add = add.replace("with hold", f"import time\ncount = Path({str(count)!r})\nwith hold")
    with try_lock(path) as nobody:
        assert nobody
        jobs = [start(path, add) for _ in range(4)]
        for job in jobs:
            assert read_line(job).startswith(b"waiting for another job")
        path.unlink()
    assert [job.wait(PATIENCE) for job in jobs] == [0] * 4
    assert count.read_text() == "4"
