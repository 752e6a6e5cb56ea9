"""Entries of a store are complete, intact and made once, also after kills and full disks."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from fp4dit.store.manifest import compute_key
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import atomic_write, atomic_write_checksummed
from tests.helpers.waiting import wait_until


def fill(out: Path) -> None:
    (out / "units").mkdir(exist_ok=True)
    for name in "ab":
        (out / "units" / name).write_text(name)


def never(out: Path) -> None:
    raise AssertionError("made again")


def slow(root: Path) -> None:
    def make(out: Path) -> None:
        with open(root / "calls.txt", "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        fill(out)

    Store(root).get_or_make("capture", "abc", make, {})


def test_concurrent_jobs_make_it_once(tmp_path: Path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(slow, [tmp_path] * 4))
    assert (tmp_path / "calls.txt").read_text() == "made\n"


def test_the_next_run_continues_the_draft_of_a_crash(tmp_path: Path):
    def crash(out: Path) -> None:
        (out / "first").write_text("whole")
        (out / "second.part").write_text("ha")
        raise RuntimeError

    def rest(out: Path) -> None:
        names = sorted(path.name for path in out.iterdir())
        assert names == ["first", "second.part"]  # another process may be writing the latter
        (out / "second").write_text("half")

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get_or_make("capture", "abc", crash, {})
    assert store.find_entry("capture", "abc") is None
    out = store.get_or_make("capture", "abc", rest, {})
    assert json.loads((out / "manifest.json").read_text())["files"].keys() == {"first", "second"}
    assert sorted(p.name for p in out.parent.iterdir()) == ["abc", "abc.lock"]


def test_a_killed_process_leaves_its_draft_and_no_lock(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from fp4dit.store.store import Store

def make(out):
    (out / "first").write_text("whole")
    sys.stdin.read()

Store(Path({str(tmp_path)!r})).get_or_make("capture", "abc", make, {{}})
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        wait_until((tmp_path / "capture" / "abc.draft" / "first").exists)
        os.kill(process.pid, signal.SIGKILL)
    store = Store(tmp_path)
    assert store.find_entry("capture", "abc") is None
    assert (
        store.get_or_make("capture", "abc", lambda out: None, {}) / "first"
    ).read_text() == "whole"


def test_seconds_count_the_work_of_stopped_attempts(tmp_path: Path):
    def stopped(out: Path) -> None:
        time.sleep(0.2)
        (out / "first").write_text("")
        raise KeyboardInterrupt

    store, begin = Store(tmp_path), time.monotonic()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.get_or_make("capture", "abc", stopped, {})
        time.sleep(0.3)  # nobody works
    out = store.get_or_make("capture", "abc", lambda out: None, {})
    longest = time.monotonic() - begin - 2 * 0.3
    assert 0.3 <= json.loads((out / "manifest.json").read_text())["seconds"] <= longest + 0.01


def test_a_full_disk_loses_nothing(tmp_path: Path):
    def full(out: Path) -> None:
        with atomic_write(out / "first") as part:
            part.write_text("whole")
        with atomic_write(out / "second") as part:
            part.write_text("ha")
            raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    with pytest.raises(OSError, match="No space"):
        store.get_or_make("capture", "abc", full, {})
    assert store.find_entry("capture", "abc") is None
    assert [
        p.name for p in store.get_or_make("capture", "abc", lambda out: None, {}).glob("[fs]*")
    ] == ["first"]


def test_the_manifest_says_how_it_was_made(tmp_path: Path):
    given = {"config": {"steps": 3}, "needs": {"calls": "012"}}
    manifest = json.loads(
        (Store(tmp_path).get_or_make("capture", "abc", fill, given) / "manifest.json").read_text()
    )
    assert manifest["stage"] == "capture"
    assert manifest["config"] == {"steps": 3}
    assert manifest["needs"] == {"calls": "012"}
    assert manifest["versions"]["torch"]
    assert manifest["created"].endswith("+00:00")
    sha = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # of "a"
    assert manifest["files"]["units/a"] == {"bytes": 1, "sha256": sha}


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest", "broken manifest"])
def test_a_damaged_entry_is_made_again_from_what_is_intact(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    out = Store(tmp_path).get_or_make("capture", "abc", fill, {})
    if damage == "changed":
        (out / "units" / "a").write_text("x")
    elif damage == "missing":
        (out / "units" / "a").unlink()
    elif damage == "no manifest":
        (out / "manifest.json").unlink()
    else:
        (out / "manifest.json").write_text("{")

    def mend(draft: Path) -> None:
        assert (draft / "units" / "b").read_text() == "b"
        assert "manifest" in damage or not (draft / "units" / "a").exists()
        fill(draft)

    store = Store(tmp_path)
    assert store.find_entry("capture", "abc") is None
    store.get_or_make("capture", "abc", mend, {})
    assert store.find_entry("capture", "abc") == out
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    Store(tmp_path).get_or_make("capture", "abc", never, {})


def test_each_file_is_read_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Store(tmp_path).get_or_make("capture", "abc", fill, {})
    store = Store(tmp_path)
    assert store.find_entry("capture", "abc")
    monkeypatch.setattr("fp4dit.utils.files.file_sha256", never)
    assert store.find_entry("capture", "abc")


def test_a_key_depends_on_values_and_not_on_order():
    assert compute_key({"a": 1, "b": [1, 2]}) == compute_key({"b": [1, 2], "a": 1})
    assert compute_key({"a": 1, "b": [1, 2]}) != compute_key({"a": 1, "b": [2, 1]})
    with pytest.raises(ValueError, match="JSON"):
        compute_key({"a": float("nan")})


def rewrite(path: Path) -> None:
    for i in range(100):
        with atomic_write(path) as part:
            part.write_text("x" * i)


def test_processes_may_write_the_same_file(tmp_path: Path):
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(rewrite, [tmp_path / "memory.json"] * 4))
    assert (tmp_path / "memory.json").read_text() == "x" * 99
    assert len(list(tmp_path.iterdir())) == 1


def test_damage_in_unread_files_does_not_block_readers(tmp_path: Path):
    """A process that reads some files of an entry is not stopped by damage in the others."""
    store = Store(tmp_path)

    def make(out: Path) -> None:
        (out / "read.json").write_text("{}")
        (out / "large.bin").write_bytes(b"bytes")

    out = store.get_or_make("stage", "key", make, {})
    (out / "large.bin").write_bytes(b"other")
    assert store.find_entry("stage", "key", "read.json") == out
    (out / "read.json").write_text("[]")
    assert store.find_entry("stage", "key", "read.json") is None
    assert store.find_entry("stage", "key") is None


def test_the_store_knows_how_long_an_entry_took(tmp_path: Path):
    store = Store(tmp_path)
    store.get_or_make("stage", "key", lambda out: None, {})
    assert 0 <= (store.read_seconds("stage", "key") or 0) < 5
    assert store.read_seconds("stage", "another") is None


def test_files_changed_before_sealing_are_made_again(tmp_path: Path):
    """Files damaged on disk between two attempts, or within one, are detected before the entry is
    sealed.
    """

    def make(out: Path) -> None:
        for name in ("first", "second"):
            if not (out / name).exists():
                with atomic_write_checksummed(out / name) as part:
                    part.write_text(name)
                made.append(name)
        if len(made) == 2:
            (out / "second").write_text("changed")
        if len(made) == 3:
            (out / "first").write_text("changed")
            raise KeyboardInterrupt

    made: list[str] = []
    store = Store(tmp_path)
    with pytest.raises(UserError, match="second is not what was written"):
        store.get_or_make("capture", "abc", make, {})
    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("capture", "abc", make, {})
    out = store.get_or_make("capture", "abc", make, {})
    assert made == ["first", "second", "second", "first"]
    assert {path.name: path.read_text() for path in out.iterdir() if path.suffix != ".json"} == {
        "first": "first",
        "second": "second",
    }
