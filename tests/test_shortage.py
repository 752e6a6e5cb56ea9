"""Memory that is full: the message names the option, and its value."""

import errno
from pathlib import Path

import pytest
import torch

from fp4dit.errors import UserError
from pipelines.command import explain
from pipelines.shortage import shortage
from tests.conftest import TOY, Run

LEARNT = {"rounding": {"batch": 16}, "calibration": {"chunk": 8}}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "of the device is full. Give a smaller rounding.batch",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "the host is full.*or memory_budget_gb",
        ),
        (MemoryError(), "the host is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the host is full"),
    ],
)
def test_it_is_told_which_option_to_change(error: Exception, message: str):
    found = shortage("reconstruct", LEARNT, error)
    assert found
    with pytest.raises(ValueError, match=f"^reconstruct: .*{message}"):
        raise found
    assert "rounding.batch (now 16) or calibration.chunk (now 8)" in str(found)
    assert ("trainer=cpu" in str(found)) == isinstance(error, torch.OutOfMemoryError)
    assert "\n" not in str(found)


def fails(_: int, error: Exception) -> None:
    raise error


def test_what_a_spawned_process_says_is_told_as_if_it_were_this_one():
    def of(error: Exception) -> Exception:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException) as raised:
            torch.multiprocessing.spawn(fails, (error,))
        return raised.value

    assert explain(of(UserError("give another prompt\nor two"))) == "give another prompt\nor two"
    full = shortage("generate", {"generation": {"chunk": 8}}, of(torch.OutOfMemoryError("CUDA out of memory. Tried")))
    assert str(full).startswith("generate: the memory of the device is full. Give a smaller generation.chunk (now 8)")
    assert str(full).endswith("CUDA out of memory. Tried")


def test_the_batch_of_what_learns_is_named():
    config = {"tuning": {"batch": 4}, "rounding": {"fit": {"batch": 16}}, "calibration": {"chunk": 8}}
    assert "smaller rounding.fit.batch (now 16) or tuning.batch (now 4) or calibration.chunk" in str(
        shortage("finetune", config, torch.OutOfMemoryError("full"))
    )


def test_other_errors_are_not_taken_for_it():
    assert shortage("reconstruct", LEARNT, RuntimeError("shapes differ")) is None


def test_a_run_tells_it_without_a_traceback(run: Run, capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr("tests.toy.Generate.run", full)
    assert run(*TOY) == 1
    error = capfd.readouterr().err
    assert "error: generate: the memory of the host is full. Give a smaller memory_budget_gb. What" in error
    assert "Traceback" not in error
    assert len(list((tmp_path / "store" / "capture").glob("*/manifest.json"))) == 1
