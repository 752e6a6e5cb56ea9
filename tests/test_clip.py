"""CLIP score and CLIP image similarity against transformers' CLIP of the same weights."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPImageProcessor

from fp4dit.errors import UserError
from fp4dit.metrics.clip import ClipScore
from fp4dit.metrics.clip_image import ClipImage
from tests.tiny_clip import PROMPTS, SIZE, clip, pictures, save_open_clip, tokenizer


def expected(model, images):
    """Cosines by transformers: of images and prompts, and the embeddings of the images."""
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    text = tokenizer()(PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    out = model(**text, **processor(images, return_tensors="pt"))
    return out.logits_per_image.diagonal() / model.logit_scale.exp(), out.image_embeds


@pytest.mark.parametrize(
    ("activation", "config", "asked"),
    [
        ("gelu", {}, False),
        ("quick_gelu", {"quick_gelu": True}, False),  # as a folder says
        ("quick_gelu", {}, True),  # as a preset says
    ],
)
def test_clip_score_is_that_of_transformers(tmp_path: Path, activation: str, config: dict, asked: bool):
    model = clip(activation)
    metric = ClipScore(str(save_open_clip(model, tmp_path / "clip", **config)), asked)
    images, files = pictures(5, SIZE, SIZE)
    cosines, _ = expected(model, files)
    torch.testing.assert_close(metric.towers.agreement(images, PROMPTS), cosines, atol=1e-5, rtol=0)
    torch.testing.assert_close(metric.score(images, images, PROMPTS), 100 * cosines.clamp(min=0), atol=1e-3, rtol=0)
    assert ("QuickGELU" in metric.about) == (activation == "quick_gelu")


def test_the_activation_matters(tmp_path: Path):
    folder = save_open_clip(clip("quick_gelu"), tmp_path / "clip")
    images, _ = pictures(5, SIZE, SIZE)
    right, wrong = (ClipScore(str(folder), quick).towers.agreement(images, PROMPTS) for quick in (True, False))
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(80, 80), (64, 96), (100, 50), (20, 24), (45, 33)])
def test_images_of_any_size_are_prepared_as_open_clip_does(tmp_path: Path, shape: tuple[int, int]):
    """But for open_clip's rounding of resized images to 8 bits."""
    folder = save_open_clip(clip("gelu"), tmp_path / "clip")
    images, files = pictures(5, *shape)
    _, own = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    level = 1 / 255 / min(open_clip.OPENAI_DATASET_STD)
    found, expected = ClipScore(str(folder)).towers.preprocess(images), torch.stack([own(file) for file in files])
    torch.testing.assert_close(found, expected, atol=1.2 * level, rtol=0)


def test_image_similarity_is_that_of_transformers(tmp_path: Path):
    model = clip("gelu")
    images, files = pictures(5, SIZE, SIZE)
    _, embeddings = expected(model, files)
    found = ClipImage(str(save_open_clip(model, tmp_path / "clip"))).score(images, images.flip(0), PROMPTS)
    torch.testing.assert_close(found, (embeddings * embeddings.flip(0)).sum(1), atol=1e-5, rtol=0)


def test_an_image_is_most_like_itself(tmp_path: Path):
    metric = ClipImage(str(save_open_clip(clip("gelu"), tmp_path / "clip")))
    images, _ = pictures(5, 48, 48)
    torch.testing.assert_close(metric.score(images, images, PROMPTS), torch.ones(5))
    assert metric.score(images, images.flip(0), PROMPTS)[0] < 0.999
    assert metric.compares


def test_prompts_that_are_cut_are_counted(tmp_path: Path):
    metric = ClipScore(str(save_open_clip(clip("gelu"), tmp_path / "clip")))
    fits, cut = "cat " * 75, "cat " * 76  # with its two marks the first has 77 tokens
    assert len(tokenizer()(fits).input_ids) == 77
    assert metric.note([fits, cut, "a cat", cut, ""]) == "2 of 5 prompts were cut at 77 tokens"
    assert metric.note([fits, "a cat"]) == ""


def test_about_names_source_backbone_and_preprocessing(tmp_path: Path):
    folder = save_open_clip(clip("gelu"), tmp_path / "clip")
    about = ClipScore(str(folder)).about
    assert f"of {folder} in open_clip 3" in about
    assert "ViT (2 layers, width 32, patch 8, 32 pixels, GELU)" in about
    assert "shortest side to its size, bicubic, centre crop" in about


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("open_clip_model.safetensors", b"\x08" + bytes(15), "is no CLIP in open_clip's layout: "),
        ("open_clip_config.json", b"{}", "missing 'model_cfg'"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    folder = save_open_clip(clip("gelu"), tmp_path / "clip")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        ClipScore(str(folder))


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path):
    folder = save_open_clip(clip("gelu"), tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"visual\.transformer\.resblocks\.2\.ln_1\.weight") as error:
        ClipScore(str(folder))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
