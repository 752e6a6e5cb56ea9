"""The time at which state is saved: as early as the process started, and rarely if it is slow."""

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fp4dit.utils import save_timer
from fp4dit.utils.save_timer import SaveTimer, process_age

Clock = Callable[[float], None]


def test_the_age_of_a_process_includes_its_imports():
    """It lies between the times at which the parent started the process and read its age."""
    code = (
        "import time; time.sleep(0.2); from fp4dit.utils.save_timer import *; print(process_age())"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert 0.2 - tick <= float(done.stdout) <= time.monotonic() - begin + tick


def test_a_system_that_tells_no_age_counts_from_the_import(monkeypatch: pytest.MonkeyPatch):
    age = process_age()
    monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    assert 0 < process_age() <= age + 1


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A function that lets seconds pass."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def measure_interval(timer: SaveTimer, advance: Clock) -> float:
    """Return the seconds, in steps of a half, until a timer is due."""
    seconds = 0.0
    while not timer.is_due:
        advance(0.5)
        seconds += 0.5
    return seconds


@pytest.mark.parametrize(("age", "expected"), [(0.1, 1), (8, 8), (3600, 60)])
def test_the_first_save_is_due_after_the_time_of_starting(
    advance: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, age: float, expected: float
):
    monkeypatch.setattr(save_timer, "process_age", lambda: age)
    timer = SaveTimer()
    assert measure_interval(timer, advance) == expected
    assert timer.save(lambda: None, tmp_path)
    assert measure_interval(timer, advance) == expected


def test_slow_saves_take_no_more_than_a_tenth_of_the_time(
    advance: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(save_timer, "process_age", lambda: 8.0)
    timer = SaveTimer()
    assert measure_interval(timer, advance) == 8  # however long a save may take
    for seconds, expected in [(12, 120), (100, 600), (0.5, 8)]:
        timer.save(lambda seconds=seconds: advance(seconds), tmp_path)
        assert measure_interval(timer, advance) == expected


def test_a_timer_of_0_seconds_is_always_due(advance: Clock, tmp_path: Path):
    timer = SaveTimer(0.0)
    for _ in range(2):
        assert timer.is_due
        timer.save(lambda: advance(3), tmp_path)


def test_a_failed_save_is_logged_and_tried_again_later(
    advance: Clock,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
):
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save_timer, "process_age", lambda: 2.0)
    timer = SaveTimer()
    assert not timer.save(fail, tmp_path / "state")
    assert f"could not write {tmp_path / 'state'}, so a killed run resumes" in caplog.text
    assert measure_interval(timer, advance) == 2
