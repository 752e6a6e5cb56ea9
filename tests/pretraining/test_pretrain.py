"""Training of the shapes model on tiny settings: each part trains, resumes, saves and loads."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from hydra import compose, initialize_config_dir
from lightning import Callback, Trainer
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fp4dit.pretraining import (
    SceneStream,
    denoising,
    draw_images,
    evaluate_model,
    export_model,
    recipe,
)
from fp4dit.pretraining.evaluate import insert_table
from fp4dit.utils import pytree_io
from fp4dit.worlds import ShapesWorld
from pipelines import pretrain
from pipelines.config.resolvers import CONF, list_options
from pipelines.pretrain import PARTS, train_part
from pipelines.runtime.callbacks import StopOnSignal
from tests.conftest import Run

WORLD = ShapesWorld()
SHAPES_PARTS = [part for part in PARTS if part != "oracle"]
TINY = [
    "transformer.trainer={devices: 1, strategy: auto}",
    "transformer.task.layers=1",
    "+autoencoder.save.n=64",
]


def run_part(part, folder, steps, *overrides, batch=2, minutes=5):
    """Train a part on tiny settings, and return its checkpoint."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("pretrain", [*TINY, f"part={part}", f"folder={folder}", *overrides])
    cfg[part].steps, cfg[part].data.batch, cfg.minutes = steps, batch, minutes
    train_part(cfg)
    return pytree_io.load_tree(folder / part / "last.safetensors")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("part=evalute", f"there is no part 'evalute': choose {', '.join(SHAPES_PARTS)} or all"),
        (
            "lowbit_linear=quartett",
            "'lowbit_linear' has no option 'quartett'; did you mean quartet or quartet_nearest?",
        ),
    ],
)
def test_a_mistake_gets_one_message(run: Run, capfd, tmp_path, override, message):
    assert run(override, f"folder={tmp_path}", main=pretrain.main, outputs=False) == 1
    error = capfd.readouterr().err
    assert f"error: {message}" in error or f"error: {override}: {message}" in error
    assert "Traceback" not in error


def test_help_lists_the_parts(run: Run, capfd):
    assert run("--help", main=pretrain.main, outputs=False) == 0
    text = capfd.readouterr().out
    assert all(part in text.split("folder  ")[0] for part in PARTS)
    assert f"  {', '.join(list_options('lowbit_linear'))}\n" in text


def test_all_parts_run_in_their_order_and_leave_a_card(run: Run, tmp_path, monkeypatch):
    called = []

    class Child:
        def __init__(self, command, **_):
            called.append(command[3:])

        def wait(self):
            return 0

    monkeypatch.setattr(pretrain.subprocess, "Popen", Child)
    assert run("part=all", f"folder={tmp_path}", main=pretrain.main, outputs=False) == 0
    assert called == [
        [f"part={part}", "evaluate.card=true", f"folder={tmp_path}"] for part in SHAPES_PARTS
    ]


@pytest.mark.unchecked
def test_checkpoints_are_saved_while_a_training_runs(tmp_path, monkeypatch):
    """This includes a task that steps its optimizers itself."""
    saved_steps = []
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer,
        "save_checkpoint",
        lambda self, path: (saved_steps.append(self.global_step), save(self, path)),
    )
    run_part("text", tmp_path, 2, minutes=0)
    run_part("transformer", tmp_path, 2, minutes=0)
    assert saved_steps == [1, 2, 2, 2, 4, 4]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The folder of all parts after 2 steps."""
    folder = tmp_path_factory.mktemp("pretrain")
    for part in ("autoencoder", "decoder", "text", "clip", "transformer"):
        run_part(part, folder, 2)
    return folder


@pytest.fixture(scope="module")
def shipped(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    export_model(WORLD, str(parts), str(folder))
    return folder


def test_parts_resume_and_keep_a_record(parts, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(parts, folder)
    for part, optimizers in (("text", 1), ("transformer", 2)):
        assert run_part(part, folder, 5)["global_step"] == 5 * optimizers
        with (folder / part / "loss.csv").open() as file:
            assert [int(row["batch"]) for row in csv.DictReader(file)] == [2, 5]


def test_latents_are_scaled_to_a_standard_deviation_of_one(parts):
    config = json.loads((parts / "autoencoder/vae/config.json").read_text())
    assert config["scaling_factor"] != pytest.approx(0.18215)


def test_the_decoder_learns_further_on_the_same_latents(parts):
    before, after = (
        AutoencoderKL.from_pretrained(parts / name / "vae") for name in ("autoencoder", "decoder")
    )
    pictures = next(iter(SceneStream(WORLD, 2))).pictures
    assert torch.equal(
        before.encode(pictures).latent_dist.mode(), after.encode(pictures).latent_dist.mode()
    )
    assert before.config.scaling_factor == after.config.scaling_factor
    assert not torch.equal(before.decoder.conv_out.weight, after.decoder.conv_out.weight)


def test_the_text_encoder_learns():
    torch.manual_seed(0)
    task, losses = recipe.train_text_encoder(WORLD, lr=3e-3, steps=200), []

    class RecordLoss(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["loss"].item())

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="cpu", max_steps=25, max_epochs=-1, callbacks=[RecordLoss()], **quiet
    )
    trainer.fit(task, DataLoader(SceneStream(WORLD, 8), batch_size=None))
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_sigterm_ends_the_training_after_the_batch():
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    stop = StopOnSignal()
    trainer = Trainer(
        accelerator="cpu", max_steps=9, max_epochs=-1, callbacks=[stop, Interrupt()], **quiet
    )
    trainer.fit(
        recipe.train_text_encoder(WORLD, lr=1e-3, steps=9),
        DataLoader(SceneStream(WORLD, 2), batch_size=None),
    )
    assert stop.stopped
    assert trainer.global_step == 2


def test_export_ships_the_average_in_16_bits(parts, shipped):
    state = pytree_io.load_tree(parts / "transformer/last.safetensors")["state_dict"]
    for name, value in load_file(
        shipped / "transformer/diffusion_pytorch_model.safetensors"
    ).items():
        assert value.dtype == torch.float16
        assert torch.equal(value, state[f"average.module.{name}"].half())


def test_training_starts_from_the_weights_that_ship(parts, shipped, monkeypatch):
    monkeypatch.setattr(ShapesWorld, "weights", shipped)
    settings = {
        "lr": 1e-3,
        "muon_lr": 1e-3,
        "levels": 1,
        "drop": 0.1,
        "decay": 0.9,
        "layers": 1,
        "compile": False,
    }
    task = recipe.train_transformer(
        WORLD, 10, further=True, parts=str(parts / "nowhere"), **settings
    )
    shipped_weights = load_file(shipped / "transformer/diffusion_pytorch_model.safetensors")
    for net in (task.transformer, task.average.module):
        assert torch.equal(net.proj_out.weight.half(), shipped_weights["proj_out.weight"])


@pytest.mark.parametrize(
    "linear", [name for name in list_options("lowbit_linear") if name != "none"]
)
def test_the_transformer_trains_in_low_bit_formats(tmp_path, linear):
    """One step from the same random weights gives nearly the same weights, under the same names."""
    override = ["transformer.task.further=false"]
    plain = run_part("transformer", tmp_path / "plain", 1, *override)["state_dict"]
    low_bit = run_part("transformer", tmp_path / linear, 1, *override, f"lowbit_linear={linear}")[
        "state_dict"
    ]
    assert low_bit.keys() == plain.keys()
    changed = {name for name in low_bit if not torch.equal(low_bit[name], plain[name])}
    assert any(name.startswith("transformer.transformer_blocks.0.attn1") for name in changed)
    for name in changed:
        assert (low_bit[name] - plain[name]).abs().max() < 0.01


@pytest.mark.unchecked
def test_a_resumed_low_bit_training_continues_its_passes(tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(denoising, "resume_rng_", lambda model, count: passes.append(count))
    for steps in (2, 3):
        run_part("transformer", tmp_path, steps, "lowbit_linear=quartet")
    assert passes == [0, 2]


def test_diffusers_loads_and_renders_what_was_exported(shipped):
    pipe = PixArtSigmaPipeline.from_pretrained(shipped)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    images = draw_images(
        WORLD, pipe, ["a small red circle on a white background"] * 2, steps=2, guidance=4.5, seed=0
    )
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()


def test_evaluation_writes_the_card_on_demand(shipped: Path, tmp_path: Path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(shipped, folder)
    card = (WORLD.weights / "README.md").read_text()
    (folder / "README.md").write_text(card)
    settings = {"images": 4, "steps": 2, "guidance": 4.5, "chunk": 2, "seed": 0}
    evaluate_model(WORLD, str(folder), **settings)
    assert "4 held-out captions" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == card
    assert not (folder / "sample.png").exists()
    for _ in range(2):
        evaluate_model(WORLD, str(folder), **settings, card=True)
    written = (folder / "README.md").read_text()
    assert written.count("generated images |") == 1
    assert "4 held-out captions" in written
    assert insert_table(written, "x") == insert_table(card, "x")
    assert (folder / "sample.png").exists()
    (folder / "README.md").unlink()
    evaluate_model(WORLD, str(folder), **settings, card=True)
    assert "4 held-out captions" in (folder / "README.md").read_text()
