"""Training of a transformer as a stage: interruptions change no bit, and images use its formats."""

import csv
import json
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fp4dit.lowbit_training.linear import TrainRule
from fp4dit.pretraining import SceneData, SceneStream, train_transformer
from fp4dit.pretraining.denoising import OPTIMIZERS, DenoisingTask
from fp4dit.utils import pytree_io
from fp4dit.utils.errors import UserError
from fp4dit.utils.resumable import TimedCheckpoint
from fp4dit.worlds import ShapesWorld
from pipelines.runtime.callbacks import LossLog
from pipelines.runtime.trainer import Runtime
from pipelines.stages.train import Train, Training
from tests.helpers.small_runs import CPU, run_stages
from tests.rounding.test_reconstruction import Killed

WORLD = ShapesWorld()
RUNTIME = Runtime(CPU, "none")
SMALL = [
    "training.steps=2",
    "training.data.batch=2",
    "training.validation.batch=2",
    "training.num_validation_batches=1",
    "prompts.count=2",
    "generation.steps=2",
    "metrics=[psnr,oracle]",
]


def make_stage(linear: Sequence[TrainRule] = (), steps: int = 3, lr: float = 1e-3) -> Train:
    """Return the stage on tiny settings."""
    settings = {"levels": 1, "drop": 0.1, "decay": 0.9, "layers": 1, "further": False, "warmup": 1}
    task = partial(train_transformer, world=WORLD, steps=steps, lr=lr, muon_lr=lr, **settings)
    data, held_out = partial(SceneData, WORLD, batch=2), SceneStream(WORLD, 2, held_out=True)
    return Train(Training(steps, 0, "32-true", data, held_out, 1, task), linear)


def run_stage(stage: Train, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run the stage, and return its weights and its summary."""
    out.mkdir(exist_ok=True)
    stage.run({}, out, RUNTIME)
    return load_file(out / "transformer.safetensors"), json.loads((out / "audit.json").read_text())


def make_checkpoint(path: Path, _: float) -> TimedCheckpoint:
    """Return a callback that saves a checkpoint after every batch."""
    return TimedCheckpoint(path, 0.0)


def kill_training(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Make the next training fail before batch `at`, with a checkpoint after every batch."""
    step = DenoisingTask.training_step

    def step_or_fail(self: DenoisingTask, *batch: Any) -> None:
        if self.global_step == at * OPTIMIZERS:
            raise Killed
        step(self, *batch)

    monkeypatch.setattr(DenoisingTask, "training_step", step_or_fail)
    monkeypatch.setattr("pipelines.stages.train.TimedCheckpoint", make_checkpoint)


@pytest.mark.parametrize(
    "linear", [[], [TrainRule("transformer_blocks.*")]], ids=["plain", "quartet"]
)
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, monkeypatch, linear):
    """A training that was killed and run again ends with the bits of an undisturbed one."""
    weights, audit = run_stage(make_stage(linear), tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        kill_training(patch, at=2)
        with pytest.raises(Killed):
            run_stage(make_stage(linear), tmp_path / "killed")
    again, summary = run_stage(make_stage(linear), tmp_path / "killed")
    assert weights.keys() == again.keys()
    assert all(torch.equal(p, again[name]) for name, p in weights.items())
    assert summary["loss"] == audit["loss"]
    assert not (tmp_path / "killed/train.resume").exists()
    with (tmp_path / "killed/loss.csv").open() as file:
        assert [row["batch"] for row in csv.DictReader(file)] == ["3"]


def test_losses_after_the_checkpoint_are_written_once(tmp_path):
    losses = LossLog(tmp_path / "loss.csv", total=60)
    for batch in (20, 40, 60):
        losses.append_row({"batch": batch, "seconds": batch / 10, "loss": 1.0})
    content = losses.path.read_bytes()
    losses.path.write_bytes(content[:-5])
    losses.drop_rows_after(45)
    losses.append_row({"batch": 60, "seconds": 6.0, "loss": 1.0})
    assert losses.path.read_bytes() == content
    losses.drop_rows_after(0)
    assert losses.path.read_bytes() == b"batch,seconds,loss\r\n"


def test_a_training_with_a_damaged_checkpoint_restarts(tmp_path, monkeypatch, caplog):
    weights, _ = run_stage(make_stage(), tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        kill_training(patch, at=2)
        with pytest.raises(Killed):
            run_stage(make_stage(), tmp_path / "killed")
    last = tmp_path / "killed/train.resume/last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    again, _ = run_stage(make_stage(), tmp_path / "killed")
    assert "begins again" in caplog.text
    assert all(torch.equal(p, again[name]) for name, p in weights.items())


def test_a_diverging_training_stops_before_its_checkpoint(tmp_path, monkeypatch):
    """A training without finite gradients stops, and the checkpoint holds finite values only."""
    monkeypatch.setattr("pipelines.stages.train.TimedCheckpoint", make_checkpoint)
    with pytest.raises(
        UserError, match=r"batch [1-9] has no finite gradient: give smaller rates, lr and muon_lr"
    ):
        run_stage(make_stage(steps=9, lr=1e30), tmp_path)
    state = pytree_io.load_tree(tmp_path / "train.resume/last.safetensors")["state_dict"]
    assert all(p.isfinite().all() for name, p in state.items() if not name.startswith("signal"))


def test_batches_depend_on_their_number_alone():
    stream = list(islice(SceneStream(WORLD, 3), 4))
    [later] = islice(SceneStream(WORLD, 3, first=2), 1)
    assert later.captions == stream[2].captions
    assert torch.equal(later.pictures, stream[2].pictures)
    assert next(iter(SceneStream(WORLD, 3, rank=1))).captions != stream[0].captions


def test_the_loss_depends_on_the_weights_alone(tmp_path):
    """The validation loss of the same weights is the same, whatever ran before in the process."""
    stage = make_stage()
    _, first = run_stage(stage, tmp_path / "a")
    torch.rand(7)
    _, second = run_stage(stage, tmp_path / "b")
    assert first["loss"] == second["loss"]
    assert first["steps"] == 3
    assert first["step_seconds"] > 0


@pytest.mark.unchecked
def test_low_bit_rows_share_their_baseline(tmp_path, monkeypatch):
    """Rows share the baseline and the reference, and images are drawn with low-bit layers."""
    drawn: list[int] = []
    monkeypatch.setattr(
        "fp4dit.lowbit_training.linear.replace_linear_layers_",
        lambda dit, rules: drawn.append(len(rules)),
    )
    row = run_stages(tmp_path, "stages=train", "lowbit_linear=quartet", small=SMALL)
    plain = run_stages(tmp_path, "stages=train_baseline", small=SMALL)
    assert (plain["train_baseline"], plain["reference"]) == (
        row["train_baseline"],
        row["reference"],
    )
    assert drawn == [0, 1]
    scores = json.loads((row["score"] / "metrics.json").read_text())
    assert scores["scalars"].keys() == {"steps", "loss", "step_seconds"}
    assert scores["metrics"]["psnr"]["mean"] is not None
