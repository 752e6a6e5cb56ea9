"""Trainers of a run: progress, devices and deterministic operations."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipelines.runtime.progress
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import SafetensorsIO
from pipelines.cli.errors import explain_error
from pipelines.runtime.progress import format_clock
from pipelines.runtime.trainer import Runtime


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch).square().mean()

    def predict_step(self, batch: Tensor, _: int) -> Tensor:
        return self.layer(batch)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def batches() -> DataLoader:
    return DataLoader(torch.ones(6, 2).split(1), batch_size=2)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def print_every_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.runtime.progress, "SECONDS_BETWEEN_LINES", -1.0)


CPU = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}


def test_lines_count_over_epochs_and_show_the_time_left(batches: DataLoader, capfd):
    Runtime(CPU, "lines", job="demo_4").make_trainer("reconstruct block 1", max_steps=7).fit(
        Task(), batches
    )
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[2] for line in lines] == [f"{i}/7" for i in range(1, 8)]
    assert lines[-1] == "demo_4  reconstruct block 1  7/7  0:00 elapsed  0:00 left"


@pytest.mark.parametrize("verb", ["predict", "test"])
def test_lines_count_batches(verb: str, batches: DataLoader, capfd):
    trainer = Runtime(CPU, "lines").make_trainer("generate")
    trainer.predict(Task(), batches) if verb == "predict" else trainer.test(
        Task(), batches, verbose=False
    )
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("shown", ["lines", "none"])
def test_progress_without_a_trainer(shown: str, capfd):
    assert list(Runtime(CPU, shown).iter_with_progress("answers", range(3))) == [0, 1, 2]
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [
        ["answers", f"{i}/3"] for i in (1, 2, 3) if shown == "lines"
    ]


def test_short_fits_print_few_lines(batches: DataLoader, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.runtime.progress, "SECONDS_BETWEEN_LINES", 60.0)
    runtime = Runtime(CPU, "lines")
    runtime.last_printed.time = float("-inf")
    for _ in range(3):
        runtime.make_trainer("reconstruct", max_steps=3).fit(Task(), batches)
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_a_bar_has_a_label(batches: DataLoader, capfd):
    Runtime(CPU, "bar").make_trainer("capture", max_steps=3).fit(Task(), batches)
    assert "capture: " in capfd.readouterr().err


def test_none_prints_and_writes_nothing(
    batches: DataLoader, capfd, tmp_path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Runtime(CPU, "none").make_trainer("capture", max_steps=3, precision="32-true").fit(
        Task(), batches
    )
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3723, "1:02:03")])
def test_durations_are_formatted_like_a_clock(seconds: float, text: str):
    assert format_clock(seconds) == text


def test_slurm_jobs_spawn_their_own_processes(
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in {
        "JOB_ID": "1",
        "JOB_NAME": "run",
        "NTASKS": "1",
        "PROCID": "0",
        "LOCALID": "0",
    }.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = Runtime({"accelerator": "cpu", "devices": 1}, "none").make_trainer(
        "", plugins=[SafetensorsIO()]
    )
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    assert isinstance(trainer.strategy.checkpoint_io, SafetensorsIO)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps", "tpu", "gqu"])
def test_an_unavailable_device_is_refused(accelerator: str, monkeypatch: pytest.MonkeyPatch):
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        _ = Runtime(CPU | {"accelerator": accelerator}).device
    message = str(refused.value)
    assert message.startswith(
        f"trainer.accelerator={accelerator}, trainer.devices=1, trainer.strategy=auto is not "
        "available"
    )
    assert message.endswith("leave out trainer=... to run on the CPU")


@pytest.mark.parametrize(
    ("name", "value"), [("devices", 0), ("devices", "foo"), ("strategy", "foo")]
)
def test_impossible_devices_are_refused(name: str, value: int | str):
    with pytest.raises(UserError, match=rf"trainer\.{name}={value}.* is not available here"):
        _ = Runtime(CPU | {name: value}).device


@pytest.fixture
def reset_deterministic():
    """Restore the deterministic mode of torch after a test."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.usefixtures("reset_deterministic")
@pytest.mark.parametrize(
    ("deterministic", "mode"),
    [("warn", 1), ("on", 2), ("off", 0), (True, 2), (False, 0)],  # torch's own numbers
)
def test_deterministic_sets_the_mode_of_torch(
    deterministic: str | bool, mode: int, batches: DataLoader
):
    trainer = Runtime(CPU, "none", deterministic=deterministic).make_trainer("")
    assert torch.get_deterministic_debug_mode() == mode
    trainer.predict(Task(), batches)


@pytest.mark.usefixtures("reset_deterministic")
def test_a_nondeterministic_operation_raises_or_warns(recwarn: pytest.WarningsRecorder):
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))

    Runtime(CPU, "none", deterministic="on").make_trainer("")
    with pytest.raises(RuntimeError) as refused:
        put()
    assert explain_error(refused.value) == (
        "deterministic=on: put_ may give other bits each time on this device; "
        "deterministic=warn allows it"
    )
    Runtime(CPU, "none").make_trainer("")
    put()
    assert any(
        "put_ does not have a deterministic implementation" in str(warned.message)
        for warned in recwarn
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": "yes"}, "deterministic=yes: choose on, warn or off"),
        ({"progress": "foo"}, "progress=foo: choose one of auto, bar, lines, none"),
        ({"memory_budget_gb": -1.0}, r"memory_budget_gb=-1\.0: give a number of GB, 0 or more"),
        ({"memory_budget_gb": float("nan")}, "memory_budget_gb=nan: give a number"),
    ],
)
def test_an_invalid_option_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Runtime(CPU, **options)
    assert Runtime(CPU, memory_budget_gb=0).memory_budget_gb == 0
