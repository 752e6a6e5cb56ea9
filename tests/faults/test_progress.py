"""A run makes progress however often it is killed, and ends with the same results."""

import os
import random
import signal
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.attention import BasicTransformerBlock

from fp4dit.utils import save_timer
from pipelines.planning.plan import PlannedStage, make_plan
from tests.conftest import Compose
from tests.faults.conftest import LONG, fork_job, has_ended
from tests.faults.drill import results
from tests.faults.test_families import FEW_STEPS, METHOD_OPTIONS, MODELS
from tests.faults.test_kills import run_undisturbed
from tests.helpers import tiny
from tests.helpers.small_runs import FEW
from tests.helpers.waiting import wait_until


@pytest.mark.parametrize("method", ["fp4dit_ft", *(["gptq", "llmfp4_fpq"] if LONG else [])])
@pytest.mark.unchecked
def test_a_run_that_is_killed_again_and_again_ends(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """Each life is killed as soon as it has saved something that no life before it had saved.

    State is saved at every opportunity, as it is by a process that takes no time to start. A life
    then repeats hardly any call of a block.
    """
    for name in ("SHORTEST", "SAVES_PER_INTERVAL"):
        monkeypatch.setattr(save_timer, name, 0.0)
    monkeypatch.setattr(save_timer, "process_age", lambda: 0.0)
    count_calls = log_calls(BasicTransformerBlock, tmp_path / "calls", monkeypatch)
    monkeypatch.setattr(tiny, "WIDTH", 128)
    tiny.save(tmp_path / "model")
    model = [*MODELS["sigma"], f"model.path={tmp_path / 'model'}", "model.dtype=float32"]
    options = [*FEW, *FEW_STEPS, *METHOD_OPTIONS.get(method, []), "metrics=paired"]
    plan = make_plan(composed(*model, *options, f"method={method}"))
    expected, rng = run_undisturbed(plan, tmp_path / "undisturbed"), random.Random(0)
    num_calls, root, seen, lives = count_calls(), tmp_path / "store", set(), 1
    while live_until_progress(plan, root, seen, rng.randint(1, 20)):
        lives += 1
        assert lives < 100
    assert lives > 3
    assert count_calls() - 2 * num_calls <= 2 * lives
    made = results(root)
    assert made.keys() == expected.keys()
    # The scores hold the seconds that the calibration took.
    assert [n for n in made if made[n] != expected[n] and "score/" not in n] == []


def log_calls(kind: type, log: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return a function that counts the calls of a class of modules in this process and forks."""
    forward = kind.forward

    def log_and_call(*args: Any, **options: Any) -> Any:
        with log.open("ab") as file:
            file.write(b".")
        return forward(*args, **options)

    monkeypatch.setattr(kind, "forward", wraps(forward)(log_and_call))
    return lambda: log.stat().st_size


def live_until_progress(
    plan: Mapping[str, PlannedStage], root: Path, seen: set[tuple[str, int]], count: int
) -> bool:
    """Run a plan until it has saved `count` states that are not among those seen, then kill it.

    Returns:
        False if it has ended by itself.
    """
    pid = fork_job(plan, root)
    wait_until(lambda: len(read_states(root) - seen) >= count or has_ended(pid))
    os.kill(pid, signal.SIGKILL)
    code = os.waitpid(pid, 0)[1]
    assert code in (0, signal.SIGKILL)
    seen |= read_states(root)
    return code != 0


def read_states(root: Path) -> set[tuple[str, int]]:
    """Return the path and a checksum of every file of all entries and drafts."""
    states = set()
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            is_temporary = name.endswith(".part") or name.startswith(".tmp")
            if is_temporary or len(path.relative_to(root).parts) < 3:  # a lock or a journal
                continue
            with suppress(FileNotFoundError):
                states.add((str(path), compute_checksum(path, path.stat().st_mtime_ns)))
    return states


@cache
def compute_checksum(path: Path, time_ns: int) -> int:
    """Return the checksum of a file that was written at this time, which is read once."""
    return zlib.crc32(path.read_bytes())
