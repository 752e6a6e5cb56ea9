"""The recipe of the shipped model, on tiny settings: every part trains, resumes, and what it leaves loads."""

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

from fp4dit import tree
from fp4dit.models.shapes import recipe
from fp4dit.models.shapes.data import Scenes
from fp4dit.models.shapes.evaluate import draw, evaluate, insert
from fp4dit.models.shapes.export import export
from fp4dit.tasks import pretrain as tasks
from pipelines import pretrain
from pipelines.pretrain import PARTS, train
from pipelines.resolvers import CONF, options
from pipelines.training import Stop
from tests.conftest import Run

TINY = ["transformer.trainer={devices: 1, strategy: auto}", "transformer.task.layers=1", "+autoencoder.save.n=64"]


def run(part, folder, steps, *overrides, batch=2, minutes=5):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("pretrain", [*TINY, f"part={part}", f"folder={folder}", *overrides])
    cfg[part].steps, cfg[part].data.batch, cfg.minutes = steps, batch, minutes
    train(cfg)
    return tree.load(folder / part / "last.safetensors")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("part=evalute", f"there is no part 'evalute': choose {', '.join(PARTS)} or all"),
        ("linear=quartett", "'linear' has no option 'quartett'; did you mean quartet?"),
    ],
)
def test_a_mistake_gets_one_message(run: Run, capfd, tmp_path, given, message):
    assert run(given, f"folder={tmp_path}", main=pretrain.main, outputs=False) == 1
    error = capfd.readouterr().err
    assert f"error: {message}" in error or f"error: {given}: {message}" in error
    assert "Traceback" not in error


def test_help_lists_the_parts(run: Run, capfd):
    assert run("--help", main=pretrain.main, outputs=False) == 0
    text = capfd.readouterr().out
    assert all(part in text.split("folder")[0] for part in PARTS)
    assert f"  {', '.join(options('linear'))}\n" in text


def test_all_parts_run_in_their_order_and_leave_a_card(run: Run, tmp_path, monkeypatch):
    called = []

    class Child:
        def __init__(self, command, **_):
            called.append(command[3:])

        def wait(self):
            return 0

    monkeypatch.setattr(pretrain.subprocess, "Popen", Child)
    assert run("part=all", f"folder={tmp_path}", main=pretrain.main, outputs=False) == 0
    assert called == [[f"part={part}", "evaluate.card=true", f"folder={tmp_path}"] for part in PARTS]


@pytest.mark.unchecked
def test_a_training_is_kept_while_it_runs(tmp_path, monkeypatch):
    """Also where the task steps its optimizers itself."""
    kept = []
    save = Trainer.save_checkpoint
    monkeypatch.setattr(
        Trainer, "save_checkpoint", lambda self, path: (kept.append(self.global_step), save(self, path))
    )
    run("text", tmp_path, 2, minutes=0)
    run("transformer", tmp_path, 2, minutes=0)
    assert kept == [1, 2, 2, 2, 4, 4]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """All parts after 2 steps, made as the command makes them."""
    folder = tmp_path_factory.mktemp("pretrain")
    for part in ("autoencoder", "decoder", "text", "clip", "transformer"):
        run(part, folder, 2)
    return folder


@pytest.fixture(scope="module")
def shipped(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    export(str(parts), str(folder))
    return folder


def test_parts_resume_and_keep_a_record(parts, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(parts, folder)
    for part, optimizers in (("text", 1), ("transformer", 2)):
        assert run(part, folder, 5)["global_step"] == 5 * optimizers
        with (folder / part / "loss.csv").open() as file:
            assert [int(row["batch"]) for row in csv.DictReader(file)] == [2, 5]


def test_latents_are_scaled_to_a_standard_deviation_of_one(parts):
    config = json.loads((parts / "autoencoder/vae/config.json").read_text())
    assert config["scaling_factor"] != pytest.approx(0.18215)


def test_the_decoder_learns_further_on_the_same_latents(parts):
    before, after = (AutoencoderKL.from_pretrained(parts / name / "vae") for name in ("autoencoder", "decoder"))
    pictures = next(iter(Scenes(2))).pictures
    assert torch.equal(before.encode(pictures).latent_dist.mode(), after.encode(pictures).latent_dist.mode())
    assert before.config.scaling_factor == after.config.scaling_factor
    assert not torch.equal(before.decoder.conv_out.weight, after.decoder.conv_out.weight)


def test_the_text_encoder_learns():
    torch.manual_seed(0)
    task, losses = recipe.text(lr=3e-3, steps=200), []

    class Keep(Callback):
        def on_train_batch_end(self, trainer, *_):
            losses.append(trainer.callback_metrics["loss"].item())

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=25, max_epochs=-1, callbacks=[Keep()], **quiet)
    trainer.fit(task, DataLoader(Scenes(8), batch_size=None))
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
    stop = Stop()
    trainer = Trainer(accelerator="cpu", max_steps=9, max_epochs=-1, callbacks=[stop, Interrupt()], **quiet)
    trainer.fit(recipe.text(lr=1e-3, steps=9), DataLoader(Scenes(2), batch_size=None))
    assert stop.stopped
    assert trainer.global_step == 2


def test_export_ships_the_average_in_16_bits(parts, shipped):
    state = tree.load(parts / "transformer/last.safetensors")["state_dict"]
    for name, value in load_file(shipped / "transformer/diffusion_pytorch_model.safetensors").items():
        assert value.dtype == torch.float16
        assert torch.equal(value, state[f"average.module.{name}"].half())


def test_training_goes_on_from_what_ships(parts, shipped, monkeypatch):
    monkeypatch.setattr(recipe, "SHIPPED", shipped)
    settings = {"lr": 1e-3, "muon_lr": 1e-3, "levels": 1, "drop": 0.1, "decay": 0.9, "layers": 1, "compile": False}
    task = recipe.transformer(10, further=True, parts=str(parts / "nowhere"), **settings)
    shipped_weights = load_file(shipped / "transformer/diffusion_pytorch_model.safetensors")
    for net in (task.transformer, task.average.module):
        assert torch.equal(net.proj_out.weight.half(), shipped_weights["proj_out.weight"])


@pytest.mark.parametrize("linear", [name for name in options("linear") if name != "none"])
def test_the_transformer_trains_in_few_bits_with_the_same_seeds(tmp_path, linear):
    """From the same random weights, to nearly the same; the state is a plain model's."""
    override = ["transformer.task.further=false"]
    plain = run("transformer", tmp_path / "plain", 1, *override)["state_dict"]
    found = run("transformer", tmp_path / linear, 1, *override, f"linear={linear}")["state_dict"]
    assert found.keys() == plain.keys()
    changed = {name for name in found if not torch.equal(found[name], plain[name])}
    assert any(name.startswith("transformer.transformer_blocks.0.attn1") for name in changed)
    for name in changed:
        assert (found[name] - plain[name]).abs().max() < 0.01


@pytest.mark.unchecked
def test_a_resumed_training_in_few_bits_draws_on(tmp_path, monkeypatch):
    passes = []
    monkeypatch.setattr(tasks, "resume_", lambda model, count: passes.append(count))
    for steps in (2, 3):
        run("transformer", tmp_path, steps, "linear=quartet")
    assert passes == [0, 2]


def test_diffusers_loads_and_renders_what_was_exported(shipped):
    pipe = PixArtSigmaPipeline.from_pretrained(shipped)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    images = draw(pipe, ["a small red circle on a white background"] * 2, steps=2, guidance=4.5, seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()


def test_evaluation_writes_the_card_of_who_asks(shipped: Path, tmp_path: Path, capsys):
    folder = tmp_path / "weights"
    shutil.copytree(shipped, folder)
    card = (recipe.SHIPPED / "README.md").read_text()
    (folder / "README.md").write_text(card)
    few = {"images": 4, "steps": 2, "guidance": 4.5, "chunk": 2, "seed": 0}
    evaluate(str(folder), **few)
    assert "4 held-out captions" in capsys.readouterr().out
    assert (folder / "README.md").read_text() == card
    assert not (folder / "sample.png").exists()
    for _ in range(2):
        evaluate(str(folder), **few, card=True)
    written = (folder / "README.md").read_text()
    assert written.count("generated images |") == 1
    assert "4 held-out captions" in written
    assert insert(written, "x") == insert(card, "x")
    assert (folder / "sample.png").exists()
    (folder / "README.md").unlink()
    evaluate(str(folder), **few, card=True)
    assert "4 held-out captions" in (folder / "README.md").read_text()
