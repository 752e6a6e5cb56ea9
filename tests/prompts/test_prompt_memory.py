"""Pipelines of all kinds draw the same images from what they encoded before, without encoders."""

from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.embed
from fp4dit.models.generic import Generic
from fp4dit.models.prompt_memory import PromptMemory, PromptRecorder, remember_prompts
from fp4dit.utils.errors import UserError
from fp4dit.utils.images import read_image
from tests.conftest import call_command
from tests.helpers import tiny
from tests.helpers.small_runs import run_stages
from tests.helpers.tiny_families import TINY_FAMILIES
from tests.models.test_generic_families import FEWEST, NEAREST

pytestmark = pytest.mark.unchecked

PROMPTS = tiny.PROMPTS[:2]

# One tensor; two; lists of tensors; a second call for guidance; masks; three encoders; videos.
KINDS = ("chroma", "flux", "z_image", "qwen_image", "lumina2", "sd3", "wan", "hunyuan_video")


@pytest.mark.parametrize("name", KINDS)
def test_images_equal_those_of_the_text_encoders(name: str, tmp_path: Path):
    family = TINY_FAMILIES[name]
    family.save(tmp_path / name)
    adapter = Generic(str(tmp_path / name), options=family.options).load()
    path = tmp_path / "texts.safetensors"
    assert remember_prompts(adapter, [(PROMPTS, 2, 4.5)], path) == 2
    expected = adapter.sample(PROMPTS, [5, 6], 2, 4.5)
    source = Generic(str(tmp_path / name), options=family.options, embeddings=str(path))
    source.check(PROMPTS)
    encoderless: Any = source.load()
    components = encoderless.pipe.components
    assert not any(x for key, x in components.items() if key.startswith("text_encoder"))
    assert torch.equal(encoderless.sample(PROMPTS, [5, 6], 2, 4.5), expected)
    with pytest.raises(UserError, match="has no embedding of this batch of prompts"):
        encoderless.sample(PROMPTS[::-1], [5, 6], 2, 4.5)


def test_a_run_draws_from_the_file_of_the_command(tmp_path: Path):
    """Calibration, tracing and drawing need no text encoder, and change nothing."""
    family = TINY_FAMILIES["qwen_image"]
    family.save(tmp_path / "model")
    model = [*family.arguments, f"model.path={tmp_path / 'model'}"]
    few = [x for x in FEWEST if x.startswith(("calibration", "generation", "prompts"))]
    out = tmp_path / "texts.safetensors"
    assert call_command(pipelines.embed.main, *model, *few, f"out={out}") == 0
    images = []
    for embeddings in ([], [f"model.embeddings={out}"]):
        paths = run_stages(tmp_path, *model, *NEAREST, *embeddings, small=FEWEST)
        images.append(read_image(paths["generate"] / "images" / "00000.png"))
    assert torch.equal(*images)


def test_what_is_missing_is_named(tmp_path: Path):
    family = TINY_FAMILIES["chroma"]
    family.save(tmp_path / "model")
    adapter = Generic(str(tmp_path / "model"), options=family.options).load()
    path = tmp_path / "texts.safetensors"
    remember_prompts(adapter, [(PROMPTS, 2, 4.5)], path)
    with pytest.raises(UserError, match=r"no embedding of the prompt 'a fox': make one .*embed"):
        PromptMemory(str(path)).check_prompts([*PROMPTS, "a fox"])
    with pytest.raises(UserError, match="there is no file of embeddings at"):
        PromptMemory(str(tmp_path / "none")).check_prompts(PROMPTS)
    weights = next((tmp_path / "model" / "vae").glob("*.safetensors"))
    with pytest.raises(UserError, match="is not a file of embeddings"):
        PromptMemory(str(weights)).check_prompts(PROMPTS)
    with pytest.raises(UserError, match="object has no method encode_prompt"):
        PromptRecorder(object())
