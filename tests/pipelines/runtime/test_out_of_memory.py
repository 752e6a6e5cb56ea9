"""Errors of full memory: the message names the options to change, and their values."""

import errno
from pathlib import Path

import pytest
import torch

from fp4dit.utils.errors import UserError
from pipelines.cli.errors import explain_error
from pipelines.runtime.oom import explain_out_of_memory
from tests.conftest import TOY, Run

CONFIG = {"rounding": {"batch_size": 16}, "calibration": {"batch_size": 8}}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            "of the device is full. Give a smaller rounding.batch_size",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            "the host is full.*or memory_budget_gb",
        ),
        (MemoryError(), "the host is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the host is full"),
    ],
)
def test_the_message_names_the_options_to_change(error: Exception, message: str):
    explanation = explain_out_of_memory("reconstruct", CONFIG, error)
    assert explanation
    with pytest.raises(ValueError, match=f"^reconstruct: .*{message}"):
        raise explanation
    assert "rounding.batch_size (now 16) or calibration.batch_size (now 8)" in str(explanation)
    assert ("trainer=cpu" in str(explanation)) == isinstance(error, torch.OutOfMemoryError)
    assert "\n" not in str(explanation)


def raise_error(_: int, error: Exception) -> None:
    raise error


def test_errors_of_spawned_processes_read_the_same():
    def raise_in_child(error: Exception) -> Exception:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException) as raised:
            torch.multiprocessing.spawn(raise_error, (error,))
        return raised.value

    assert (
        explain_error(raise_in_child(UserError("give another prompt\nor two")))
        == "give another prompt\nor two"
    )
    explanation = explain_out_of_memory(
        "generate",
        {"generation": {"batch_size": 8}},
        raise_in_child(torch.OutOfMemoryError("CUDA out of memory. Tried")),
    )
    assert str(explanation).startswith(
        "generate: the memory of the device is full. Give a smaller generation.batch_size (now 8)"
    )
    assert str(explanation).endswith("CUDA out of memory. Tried")


def test_batch_sizes_of_learning_are_named_first():
    config = {
        "finetune": {"batch_size": 4},
        "rounding": {"inner": {"batch_size": 16}},
        "calibration": {"batch_size": 8},
    }
    explanation = explain_out_of_memory("finetune", config, torch.OutOfMemoryError("full"))
    assert (
        "smaller rounding.inner.batch_size (now 16) or finetune.batch_size (now 4) or "
        "calibration.batch_size"
    ) in str(explanation)


def test_other_errors_are_not_explained():
    assert explain_out_of_memory("reconstruct", CONFIG, RuntimeError("shapes differ")) is None


def test_a_run_reports_it_without_a_traceback(
    run: Run, capfd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fill_memory(*_: object) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr("tests.helpers.toy.Generate.run", fill_memory)
    assert run(*TOY) == 1
    error = capfd.readouterr().err
    assert (
        "error: generate: the memory of the host is full. Give a smaller memory_budget_gb. Finished"
        in error
    )
    assert "Traceback" not in error
    assert len(list((tmp_path / "store" / "capture").glob("*/manifest.json"))) == 1
