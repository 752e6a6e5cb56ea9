"""A transformer that is trained anew: the same whatever happens meanwhile, and drawn from in as few bits."""

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

from fp4dit import tree
from fp4dit.errors import UserError
from fp4dit.models.shapes.data import SceneData, Scenes
from fp4dit.models.shapes.recipe import transformer
from fp4dit.resume import Keep
from fp4dit.tasks.pretrain import OPTIMIZERS, DenoisingTask
from fp4dit.training.layer import TrainRule
from pipelines import trained
from pipelines.runtime import Runtime
from pipelines.trained import Train, Training
from pipelines.training import Losses
from tests.test_end_to_end import CPU, run
from tests.test_reconstruct import Killed

RUNTIME = Runtime(CPU, "none")
SMALL = [
    "training.steps=2",
    "training.data.batch=2",
    "training.measured.batch=2",
    "training.measured_batches=1",
    "prompts.count=2",
    "generation.steps=2",
    "metrics=[psnr,oracle]",
]


def train(linear: Sequence[TrainRule] = (), steps: int = 3, lr: float = 1e-3) -> Train:
    task = partial(
        transformer, steps=steps, lr=lr, muon_lr=lr, levels=1, drop=0.1, decay=0.9, layers=1, further=False, warmup=1
    )
    return Train(Training(steps, 0, "32-true", partial(SceneData, batch=2), Scenes(2, held_out=True), 1, task), linear)


def made(stage: Train, out: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    out.mkdir(exist_ok=True)
    stage.run({}, out, RUNTIME)
    return load_file(out / "transformer.safetensors"), json.loads((out / "audit.json").read_text())


def dying(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The next training ends before batch `at`, and is kept after each."""
    step = DenoisingTask.training_step

    def dies(self: DenoisingTask, *batch: Any) -> None:
        if self.global_step == at * OPTIMIZERS:
            raise Killed
        step(self, *batch)

    monkeypatch.setattr(DenoisingTask, "training_step", dies)
    monkeypatch.setattr(trained, "Keep", lambda path, _: Keep(path, 0.0))


@pytest.mark.parametrize("linear", [[], [TrainRule("transformer_blocks.*")]], ids=["plain", "quartet"])
def test_a_killed_training_ends_with_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch, linear):
    weights, audit = made(train(linear), tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        dying(patch, at=2)
        with pytest.raises(Killed):
            made(train(linear), tmp_path / "killed")
    again, found = made(train(linear), tmp_path / "killed")
    assert weights.keys() == again.keys()
    assert all(torch.equal(p, again[name]) for name, p in weights.items())
    assert found["loss"] == audit["loss"]
    assert not (tmp_path / "killed/kept").exists()
    with (tmp_path / "killed/loss.csv").open() as file:
        assert [row["batch"] for row in csv.DictReader(file)] == ["3"]


def test_the_losses_after_what_was_kept_are_written_once(tmp_path):
    losses = Losses(tmp_path / "loss.csv", total=60)
    for batch in (20, 40, 60):
        losses.write({"batch": batch, "seconds": batch / 10, "loss": 1.0})
    whole = losses.path.read_bytes()
    losses.path.write_bytes(whole[:-5])
    losses.forget(45)
    losses.write({"batch": 60, "seconds": 6.0, "loss": 1.0})
    assert losses.path.read_bytes() == whole
    losses.forget(0)
    assert losses.path.read_bytes() == b"batch,seconds,loss\r\n"


def test_a_training_whose_kept_state_is_damaged_begins_anew(tmp_path, monkeypatch, caplog):
    weights, _ = made(train(), tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        dying(patch, at=2)
        with pytest.raises(Killed):
            made(train(), tmp_path / "killed")
    last = tmp_path / "killed/kept/last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    again, _ = made(train(), tmp_path / "killed")
    assert "begins again" in caplog.text
    assert all(torch.equal(p, again[name]) for name, p in weights.items())


def test_what_diverges_stops_before_anything_that_is_kept_has_seen_it(tmp_path, monkeypatch):
    monkeypatch.setattr(trained, "Keep", lambda path, _: Keep(path, 0.0))
    with pytest.raises(UserError, match=r"batch [1-9] has no finite gradient: give smaller rates, lr and muon_lr"):
        made(train(steps=9, lr=1e30), tmp_path)
    state = tree.load(tmp_path / "kept/last.safetensors")["state_dict"]
    assert all(p.isfinite().all() for name, p in state.items() if not name.startswith("signal"))


def test_batches_depend_on_their_number_alone():
    stream = list(islice(Scenes(3), 4))
    [later] = islice(Scenes(3, first=2), 1)
    assert later.captions == stream[2].captions
    assert torch.equal(later.pictures, stream[2].pictures)
    assert next(iter(Scenes(3, rank=1))).captions != stream[0].captions


def test_the_loss_is_that_of_scenes_that_are_held_out_with_the_same_noise(tmp_path):
    """Whatever was trained before, and however long: of the same weights it is the same."""
    stage = train()
    _, first = made(stage, tmp_path / "a")
    torch.rand(7)
    _, second = made(stage, tmp_path / "b")
    assert first["loss"] == second["loss"]
    assert first["steps"] == 3
    assert first["step_seconds"] > 0


@pytest.mark.unchecked
def test_rows_share_what_they_are_compared_with_and_are_drawn_in_few_bits(tmp_path, monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr("fp4dit.training.layer.train_in_few_bits_", lambda dit, rules: drawn.append(len(rules)))
    row = run(tmp_path, "stages=trained", "linear=quartet", small=SMALL)
    plain = run(tmp_path, "stages=trained_plain", small=SMALL)
    assert (plain["plain"], plain["reference"]) == (row["plain"], row["reference"])
    assert drawn == [0, 1]
    scores = json.loads((row["score"] / "metrics.json").read_text())
    assert scores["scalars"].keys() == {"steps", "loss", "step_seconds"}
    assert scores["metrics"]["psnr"]["mean"] is not None
