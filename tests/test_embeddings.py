"""Texts embedded beforehand: the same images without a text encoder, and what is missing is named."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from fp4dit.embeddings import Embeddings, save
from fp4dit.errors import UserError
from fp4dit.models.pixart import PixArt, PixArtPipeline
from pipelines.plan import check, plan
from pipelines.resolvers import CONF
from tests import tiny
from tests.conftest import Compose

RUN = ["calibration.trained=2", "calibration.held_out=1", "prompts.count=2"]


@pytest.fixture(scope="module")
def file(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made by the command, of three captions for calibration, two for evaluation and the empty text."""
    out = tmp_path_factory.mktemp("embeddings") / "texts.safetensors"
    model = ["model=pixart_sigma", f"model.path={pixart_folder}", "model.dtype=float32", "model.tokens=20"]
    command = [sys.executable, "-m", "pipelines.embed", *model, *RUN, f"out={out}"]
    subprocess.run(command, cwd=CONF.parent, check=True)
    return out


@pytest.fixture(scope="module")
def bare(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as it is saved without a text encoder."""
    folder = tmp_path_factory.mktemp("bare")
    DiffusionPipeline.from_pretrained(pixart_folder, text_encoder=None, tokenizer=None).save_pretrained(folder)
    assert not {"text_encoder", "tokenizer"} & {path.name for path in folder.iterdir()}
    return folder


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_the_images_are_those_of_the_text_encoder(pipeline: PixArtPipeline, bare: Path, file: Path, guidance: float):
    prompts = list(Embeddings(str(file)).places)[1:3]
    without = PixArt(str(bare), tokens=20, embeddings=str(file)).load()
    assert without.pipe.text_encoder is None
    images = [model.sample(prompts, [5, 6], 2, guidance) for model in (pipeline, without)]
    assert torch.equal(*images)
    assert not torch.equal(images[0][0], without.sample(prompts[::-1], [5, 6], 2, guidance)[0])


def test_a_text_encoder_that_is_there_is_not_loaded(pixart_folder: Path, file: Path):
    assert PixArt(str(pixart_folder), tokens=20, embeddings=str(file)).load().pipe.text_encoder is None


def test_the_prompts_of_a_run_are_all_there(composed: Compose, bare: Path, file: Path):
    steps = plan(composed("model=pixart_sigma", f"model.path={bare}", f"model.embeddings={file}", *RUN))
    for name in ("capture", "generate", "reference"):
        check(name, steps[name].make())
    more = plan(composed("model=pixart_sigma", f"model.path={bare}", f"model.embeddings={file}", "prompts.count=3"))
    with pytest.raises(UserError, match=r"has no embedding of the prompt '.+': make one .*pipelines.embed"):
        check("generate", more["generate"].make())


def test_no_text_encoder_and_no_embeddings(bare: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"has no text encoder: give model.embeddings=.*pipelines.embed"):
        PixArt(str(bare)).load()
    with pytest.raises(UserError, match="no file of embeddings at"):
        PixArt(str(bare), embeddings=str(tmp_path / "none")).check(["a"])
    wrong = bare / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is no file of embeddings"):
        PixArt(str(bare), embeddings=str(wrong)).check(["a"])


def test_what_is_in_the_file_is_part_of_what_is_made_with_it(composed: Compose, bare: Path, file: Path, tmp_path: Path):
    copied = tmp_path / "texts.safetensors"
    given = ("model=pixart_sigma", f"model.path={bare}", f"model.embeddings={copied}")
    shutil.copy(file, copied)
    first = plan(composed(*given))
    save([""], torch.zeros(1, 20, tiny.WIDTH), torch.ones(1, 20, dtype=torch.long), copied)
    second = plan(composed(*given))
    assert all(first[name].key != second[name].key for name in ("capture", "reconstruct", "generate", "reference"))
    without = plan(composed(*given[:2]))["capture"].identity["content"]["model"]
    assert first["capture"].identity["content"]["model"].startswith(f"{without} ")
