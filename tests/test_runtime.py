from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

import pipelines.progress
from fp4dit.errors import UserError
from fp4dit.resume import TensorIO
from pipelines.command import explain
from pipelines.progress import span
from pipelines.runtime import Runtime


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
def data() -> DataLoader:
    return DataLoader(torch.ones(6, 2).split(1), batch_size=2)  # pyright: ignore[reportArgumentType]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.progress, "EVERY", -1.0)


CPU = {"accelerator": "cpu", "devices": 1, "strategy": "auto"}


def test_lines_count_over_epochs_and_tell_the_time_left(data: DataLoader, capfd):
    Runtime(CPU, "lines", job="demo_4").trainer("reconstruct block 1", max_steps=7).fit(Task(), data)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[2] for line in lines] == [f"{i}/7" for i in range(1, 8)]
    assert lines[-1] == "demo_4  reconstruct block 1  7/7  0:00 elapsed  0:00 left"


@pytest.mark.parametrize("verb", ["predict", "test"])
def test_lines_count_batches(verb: str, data: DataLoader, capfd):
    trainer = Runtime(CPU, "lines").trainer("generate")
    trainer.predict(Task(), data) if verb == "predict" else trainer.test(Task(), data, verbose=False)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines] == ["1/3", "2/3", "3/3"]


@pytest.mark.parametrize("shown", ["lines", "none"])
def test_what_no_trainer_does_is_counted_too(shown: str, capfd):
    assert list(Runtime(CPU, shown).watched("answers", range(3))) == [0, 1, 2]
    lines = capfd.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [["answers", f"{i}/3"] for i in (1, 2, 3) if shown == "lines"]


def test_short_fits_do_not_flood_the_screen(data: DataLoader, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipelines.progress, "EVERY", 60.0)
    runtime = Runtime(CPU, "lines")
    runtime.clock.last = float("-inf")
    for _ in range(3):
        runtime.trainer("reconstruct", max_steps=3).fit(Task(), data)
    assert len(capfd.readouterr().out.splitlines()) == 1


def test_a_bar_is_labelled(data: DataLoader, capfd):
    Runtime(CPU, "bar").trainer("capture", max_steps=3).fit(Task(), data)
    assert "capture: " in capfd.readouterr().err


def test_none_says_nothing_and_keeps_nothing(data: DataLoader, capfd, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Runtime(CPU, "none").trainer("capture", max_steps=3, precision="32-true").fit(Task(), data)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (75, "1:15"), (3723, "1:02:03")])
def test_a_span_reads_like_a_clock(seconds: float, text: str):
    assert span(seconds) == text


def test_in_a_job_of_slurm_processes_are_ours_whatever_else_is_plugged_in(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"JOB_ID": "1", "JOB_NAME": "run", "NTASKS": "1", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    trainer = Runtime({"accelerator": "cpu", "devices": 1}, "none").trainer("", plugins=[TensorIO()])
    assert isinstance(trainer._accelerator_connector.cluster_environment, LightningEnvironment)
    assert isinstance(trainer.strategy.checkpoint_io, TensorIO)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps", "tpu", "gqu"])
def test_a_device_that_is_not_here_is_refused_by_name(accelerator: str, monkeypatch: pytest.MonkeyPatch):
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(UserError) as refused:
        _ = Runtime(CPU | {"accelerator": accelerator}).device
    told = str(refused.value)
    assert told.startswith(f"trainer.accelerator={accelerator}, trainer.devices=1, trainer.strategy=auto cannot be had")
    assert told.endswith("leave trainer=... out to run on the CPU")


@pytest.mark.parametrize(("name", "value"), [("devices", 0), ("devices", "foo"), ("strategy", "foo")])
def test_devices_that_there_cannot_be_are_refused_by_name(name: str, value: int | str):
    with pytest.raises(UserError, match=rf"trainer\.{name}={value}.* cannot be had here"):
        _ = Runtime(CPU | {name: value}).device


@pytest.fixture
def chosen():
    """What torch is told in a test is gone after it."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize(
    ("deterministic", "mode"),
    [("warn", 1), ("on", 2), ("off", 0), (True, 2), (False, 0)],  # torch's own numbers
)
def test_torch_is_told_what_it_may_choose_from(deterministic: str | bool, mode: int, data: DataLoader):
    trainer = Runtime(CPU, "none", deterministic=deterministic).trainer("")
    assert torch.get_deterministic_debug_mode() == mode
    trainer.predict(Task(), data)


@pytest.mark.usefixtures("chosen")
def test_an_operation_that_may_give_other_bits_is_refused_or_told(recwarn: pytest.WarningsRecorder):
    place = lambda: torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2))
    Runtime(CPU, "none", deterministic="on").trainer("")
    with pytest.raises(RuntimeError) as refused:
        place()
    assert explain(refused.value) == (
        "deterministic=on: put_ may give other bits each time on this device; warn allows it"
    )
    Runtime(CPU, "none").trainer("")
    place()
    assert any("put_ does not have a deterministic implementation" in str(warned.message) for warned in recwarn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"deterministic": "yes"}, "deterministic=yes: choose on, warn or off"),
        ({"progress": "foo"}, "progress=foo: choose one of auto, bar, lines, none"),
        ({"memory_budget_gb": -1.0}, r"memory_budget_gb=-1\.0: give a number of GB, 0 or more"),
        ({"memory_budget_gb": float("nan")}, "memory_budget_gb=nan: give a number"),
    ],
)
def test_what_is_no_choice_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        Runtime(CPU, **given)
    assert Runtime(CPU, memory_budget_gb=0).memory_budget_gb == 0
