"""Locks between real processes: one at a time, who waits knows for whom, and a dead holder is replaced."""

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
import time
from pathlib import Path

import pytest

from fp4dit.locks import free, holder, locked

HOLD = """
import sys, time
from pathlib import Path
from fp4dit.locks import locked

with locked(Path(sys.argv[1]), "capture/abc", "demo_4"):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
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


def hold(path: Path, seconds: float, code: str = HOLD) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(path), str(seconds)], stdout=subprocess.PIPE
    )
    assert process.stdout
    assert process.stdout.readline() == b"mine\n"
    return process


def test_who_waits_says_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path, 0.3) as process:
        with free(path) as nobody:
            assert not nobody
        with locked(path, "capture/abc"):
            assert process.wait(5) == 0
    [told] = [record.message for record in caplog.records]
    who = f"process {process.pid} on {re.escape(socket.gethostname())}"
    assert re.fullmatch(rf"waiting for {who} \(demo_4\), since \d\d \w+ \d\d:\d\d:\d\d, which makes capture/abc", told)
    assert [p.name for p in tmp_path.iterdir()] == ["abc.lock"]
    with free(path) as nobody:
        assert nobody


@pytest.mark.filterwarnings("ignore:flock not supported")
@pytest.mark.parametrize("code", [HOLD, SOFT + HOLD], ids=["flock", "by existence"])
def test_a_killed_holder_is_replaced_while_one_waits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, code: str
):
    """Also where the file system, as some of clusters, has no locks, and a file that stays is all there is."""
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path, 60, code) as process:
        if code != HOLD:
            monkeypatch.setattr(fcntl, "flock", refuse)
        waiting = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(path), "0"], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        os.kill(process.pid, signal.SIGKILL)
    known = holder(path)
    assert known
    assert known.pid in (process.pid, waiting.pid)
    assert waiting.communicate(timeout=30)[0] == b"mine\n"
    with locked(path, "capture/abc"):
        mine = holder(path)
        assert mine
        assert mine.pid == os.getpid()
    assert holder(path) is None


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_who_waits_for_another_machine_without_locks_is_told_what_to_remove(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Where the dead one of this machine would be replaced. Doing as one is told helps."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "a b.lock"
    with hold(path, 60, SOFT + ELSEWHERE + HOLD) as process:
        process.kill()
    waiting = threading.Thread(target=lambda: locked(path, "capture/abc").__enter__(), daemon=True)
    waiting.start()
    waiting.join(1.0)
    [told] = [record.message for record in caplog.records]
    assert f"waiting for process {process.pid} on elsewhere (demo_4), since " in told
    assert "if that one is dead, rm " in told
    subprocess.run(told[told.index("rm ") :], shell=True, check=True)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_lock_that_another_machine_has_just_removed_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As NFS says of a file that is gone from the server while it is open here."""
    flock, answers = fcntl.flock, iter([errno.ESTALE, errno.ESTALE])

    def stale(*given: int) -> None:
        if number := next(answers, None):
            raise OSError(number, "Stale file handle")
        flock(*given)

    monkeypatch.setattr(fcntl, "flock", stale)
    path = tmp_path / "abc.lock"
    with free(path) as nobody:
        assert not nobody
    with locked(path, "capture/abc") as mine:
        assert mine
        with locked(path, "capture/abc", patient=False) as again:
            assert not again


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_a_holder_that_says_nothing_is_waited_for_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    path = tmp_path / "abc.lock"
    with hold(path, 1.5):
        path.with_name("abc.lock.json").write_text('{"host": ')
        with locked(path, "capture/abc"):
            pass
    assert [record.message for record in caplog.records] == ["waiting for another job, which makes capture/abc"]


def test_a_lock_that_is_removed_while_others_wait_still_has_one_holder(tmp_path: Path):
    """As the store's garbage collection does, which holds it meanwhile."""
    path, count = tmp_path / "abc.lock", tmp_path / "count"
    add = HOLD.replace('print("mine", flush=True)', "n = int(Path(sys.argv[3]).read_text())").replace(
        "time.sleep(float(sys.argv[2]))", "time.sleep(0.02); Path(sys.argv[3]).write_text(str(n + 1))"
    )
    count.write_text("0")
    with free(path) as nobody:
        assert nobody
        jobs = [subprocess.Popen([sys.executable, "-c", add, str(path), "0", str(count)]) for _ in range(4)]
        time.sleep(0.5)
        path.unlink()
    assert [job.wait(30) for job in jobs] == [0] * 4
    assert count.read_text() == "4"
