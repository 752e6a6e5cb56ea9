"""Prompt embeddings draw the same images without a text encoder, and missing ones are named."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

import pipelines.embed
from fp4dit.data.embeddings import PromptEmbeddings, save_embeddings
from fp4dit.models.pixart import PixArt, PixArtAdapter
from fp4dit.utils.errors import UserError
from pipelines.planning.executor import check_stage
from pipelines.planning.plan import make_plan
from tests.conftest import Compose, call_command
from tests.helpers import tiny

RUN = ["calibration.num_prompts=2", "calibration.num_val_prompts=1", "prompts.count=2"]


@pytest.fixture(scope="module")
def embeddings_file(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File of the command, with three prompts to calibrate on, two to draw, and the empty one."""
    out = tmp_path_factory.mktemp("embeddings") / "texts.safetensors"
    model = [
        "model=pixart_sigma",
        f"model.path={pixart_folder}",
        "model.dtype=float32",
        "model.tokens=20",
    ]
    assert call_command(pipelines.embed.main, *model, *RUN, f"out={out}") == 0
    return out


@pytest.fixture(scope="module")
def encoderless_folder(pixart_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, saved without its text encoder."""
    folder = tmp_path_factory.mktemp("encoderless")
    pipe = DiffusionPipeline.from_pretrained(pixart_folder, text_encoder=None, tokenizer=None)
    pipe.save_pretrained(folder)
    assert not {"text_encoder", "tokenizer"} & {path.name for path in folder.iterdir()}
    return folder


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_images_equal_those_of_the_text_encoder(
    pipeline: PixArtAdapter, encoderless_folder: Path, embeddings_file: Path, guidance: float
):
    prompts = list(PromptEmbeddings(str(embeddings_file)).indices)[1:3]
    source = PixArt(str(encoderless_folder), tokens=20, embeddings=str(embeddings_file))
    encoderless = source.load()
    assert encoderless.pipe.text_encoder is None
    expected = pipeline.sample(prompts, [5, 6], 2, guidance)
    assert torch.equal(encoderless.sample(prompts, [5, 6], 2, guidance), expected)
    swapped = encoderless.sample(prompts[::-1], [5, 6], 2, guidance)
    assert not torch.equal(swapped[0], expected[0])


def test_embeddings_replace_an_existing_text_encoder(pixart_folder: Path, embeddings_file: Path):
    source = PixArt(str(pixart_folder), tokens=20, embeddings=str(embeddings_file))
    assert source.load().pipe.text_encoder is None


def test_the_file_holds_all_prompts_of_a_run(
    composed: Compose, encoderless_folder: Path, embeddings_file: Path
):
    model = [
        "model=pixart_sigma",
        f"model.path={encoderless_folder}",
        f"model.embeddings={embeddings_file}",
    ]
    steps = make_plan(composed(*model, *RUN))
    for name in ("capture", "generate", "reference"):
        check_stage(name, steps[name].instantiate_stage())
    more = make_plan(composed(*model, "prompts.count=3"))
    message = r"has no embedding of the prompt '.+': make one .*pipelines.embed"
    with pytest.raises(UserError, match=message):
        check_stage("generate", more["generate"].instantiate_stage())


def test_wrong_or_missing_embeddings_are_refused(encoderless_folder: Path, tmp_path: Path):
    folder = str(encoderless_folder)
    message = r"has no text encoder: give model.embeddings=.*pipelines.embed"
    with pytest.raises(UserError, match=message):
        PixArt(folder).load()
    with pytest.raises(UserError, match="no file of embeddings at"):
        PixArt(folder, embeddings=str(tmp_path / "none")).check(["a"])
    weights = encoderless_folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match="is not a file of embeddings"):
        PixArt(folder, embeddings=str(weights)).check(["a"])


def test_the_content_of_the_file_is_part_of_every_key(
    composed: Compose, encoderless_folder: Path, embeddings_file: Path, tmp_path: Path
):
    copied = tmp_path / "texts.safetensors"
    model = ("model=pixart_sigma", f"model.path={encoderless_folder}")
    overrides = (*model, f"model.embeddings={copied}")
    shutil.copy(embeddings_file, copied)
    first = make_plan(composed(*overrides))
    embeds, mask = torch.zeros(1, 20, tiny.WIDTH), torch.ones(1, 20, dtype=torch.long)
    save_embeddings([""], embeds, mask, copied)
    second = make_plan(composed(*overrides))
    for name in ("capture", "reconstruct", "generate", "reference"):
        assert first[name].key != second[name].key
    without = make_plan(composed(*model))["capture"].identity["content"]["model"]
    assert first["capture"].identity["content"]["model"].startswith(f"{without} ")
