"""Memory that is full: the message names the option, and its value."""

import errno
from pathlib import Path

import pytest
import torch

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
