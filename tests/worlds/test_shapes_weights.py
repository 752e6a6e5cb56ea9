"""The weights in the repository: complete, small, and loaded by stock libraries."""

from pathlib import Path

import open_clip
import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors import safe_open

from fp4dit.data.prompts import get_texts
from fp4dit.pretraining import draw_images
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions

WORLD = ShapesWorld()
SHIPPED = WORLD.weights
pytestmark = pytest.mark.skipif(
    not (SHIPPED / "model_index.json").exists(), reason="the model is not trained yet"
)


def test_shipped_weights_are_16_bit_and_small():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md", ".png"}
    for path in SHIPPED.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            assert {file.get_slice(name).get_dtype() for name in names} <= {"F16", "BF16", "I64"}, (
                path
            )


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.unchecked
def test_the_shipped_model_draws_its_captions(dtype):
    pipe = PixArtSigmaPipeline.from_pretrained(SHIPPED, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {
        dtype or torch.float32
    }
    captions = get_texts(draw_captions(16, WORLD, held_out=True, seed=1))
    images = draw_images(WORLD, pipe, captions, steps=20, guidance=4.5, seed=0)
    assert sum(WORLD.judge_images(images, captions)["colours"]) >= 12


def test_open_clip_loads_the_shipped_clip():
    name = f"local-dir:{SHIPPED / 'clip'}"
    model, _ = open_clip.create_model_from_pretrained(name)
    tokens = open_clip.get_tokenizer(name)(get_texts(draw_captions(2, WORLD, held_out=True)))
    assert model.encode_text(tokens).shape == (2, model.visual.output_dim)


def test_the_card_has_the_figures():
    card = Path(SHIPPED / "README.md").read_text()
    assert "512 held-out captions" in card
    assert "apache-2.0" in card
