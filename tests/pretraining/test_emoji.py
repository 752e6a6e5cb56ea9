"""The recipe on the emoji world, with artwork that the test draws: every part trains and loads."""

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from fp4dit.pretraining import draw_images, evaluate_model, export_model
from fp4dit.worlds import EmojiWorld
from pipelines.config.resolvers import CONF
from pipelines.pretrain import train_part
from tests.worlds.synthetic import write_artwork

ONE_PROCESS = "{devices: 1, strategy: auto}"
TINY = [
    "world=emoji",
    "transformer.task.layers=1",
    "+autoencoder.save.n=64",
    *(f"{part}.trainer={ONE_PROCESS}" for part in ("autoencoder", "decoder", "transformer")),
]


@pytest.fixture(scope="module")
def artwork(tmp_path_factory):
    return str(write_artwork(tmp_path_factory.mktemp("artwork")))


@pytest.fixture(scope="module")
def weights(tmp_path_factory, artwork):
    """All parts after one step, exported."""
    folder = tmp_path_factory.mktemp("emoji")
    for part in ("autoencoder", "decoder", "text", "clip", "oracle", "transformer"):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(
                "pretrain", [*TINY, f"part={part}", f"folder={folder}", f"artwork={artwork}"]
            )
        cfg[part].steps, cfg[part].data.batch = 1, 2
        train_part(cfg)
    export_model(EmojiWorld(), str(folder), str(folder / "weights"))
    return folder / "weights"


def test_latents_have_sixteen_channels_and_diffusers_draws(weights):
    pipe = PixArtSigmaPipeline.from_pretrained(weights)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.vae.config.latent_channels == pipe.transformer.config.in_channels == 16
    captions = ["a large otter on a blue background"] * 2
    images = draw_images(EmojiWorld(), pipe, captions, steps=2, guidance=4.5, seed=0)
    assert images.shape == (2, 3, 64, 64)
    assert images.isfinite().all()


def test_evaluation_judges_with_the_exported_oracle(weights, artwork, monkeypatch, capsys):
    monkeypatch.setattr(EmojiWorld, "weights", weights)
    evaluate_model(
        EmojiWorld(artwork),
        str(weights),
        images=4,
        steps=2,
        guidance=4.5,
        chunk=2,
        seed=0,
        card=True,
    )
    assert "| | emoji | background | relation | all | CLIP score |" in capsys.readouterr().out
    assert "world=emoji part=evaluate" in (weights / "README.md").read_text()
    assert (weights / "sample.png").exists()


def test_all_weights_have_16_bits(weights):
    for path in weights.rglob("*.safetensors"):
        floating = {value.dtype for value in load_file(path).values() if value.is_floating_point()}
        assert floating == {torch.float16}, path
