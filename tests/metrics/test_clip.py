"""CLIP score and CLIP image similarity agree with transformers' CLIP of the same weights."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from transformers import CLIPImageProcessor

from fp4dit.metrics.clip import CLIPImageSimilarity, CLIPScore
from fp4dit.utils.errors import UserError
from tests.helpers.tiny_clip import (
    PROMPTS,
    SIZE,
    draw_pictures,
    make_clip,
    make_tokenizer,
    save_open_clip,
)


def run_transformers_clip(model, images):
    """Return the cosines of images and prompts by transformers, and the image embeddings."""
    size = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    text = make_tokenizer()(
        PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    out = model(**text, **processor(images, return_tensors="pt"))
    return out.logits_per_image.diagonal() / model.logit_scale.exp(), out.image_embeds


@pytest.mark.parametrize(
    ("activation", "config", "quick_gelu"),
    [
        ("gelu", {}, False),
        ("quick_gelu", {"quick_gelu": True}, False),  # set by the folder
        ("quick_gelu", {}, True),  # set by the preset
    ],
)
def test_clip_score_is_that_of_transformers(
    tmp_path: Path, activation: str, config: dict, quick_gelu: bool
):
    model = make_clip(activation)
    metric = CLIPScore(str(save_open_clip(model, tmp_path / "clip", **config)), quick_gelu)
    images, files = draw_pictures(5, SIZE, SIZE)
    cosines, _ = run_transformers_clip(model, files)
    torch.testing.assert_close(
        metric.backbone.cosine_similarity(images, PROMPTS), cosines, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        metric.score(images, images, PROMPTS), 100 * cosines.clamp(min=0), atol=1e-3, rtol=0
    )
    assert ("QuickGELU" in metric.about) == (activation == "quick_gelu")


def test_the_activation_matters(tmp_path: Path):
    folder = save_open_clip(make_clip("quick_gelu"), tmp_path / "clip")
    images, _ = draw_pictures(5, SIZE, SIZE)
    right, wrong = (
        CLIPScore(str(folder), quick).backbone.cosine_similarity(images, PROMPTS)
        for quick in (True, False)
    )
    assert (right - wrong).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(80, 80), (64, 96), (100, 50), (20, 24), (45, 33)])
def test_images_of_any_size_are_prepared_as_open_clip_does(tmp_path: Path, shape: tuple[int, int]):
    """The results differ by open_clip's rounding of resized images to 8 bits."""
    folder = save_open_clip(make_clip("gelu"), tmp_path / "clip")
    images, files = draw_pictures(5, *shape)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    level = 1 / 255 / min(open_clip.OPENAI_DATASET_STD)
    prepared = CLIPScore(str(folder)).backbone.preprocess(images)
    expected = torch.stack([preprocess(file) for file in files])
    torch.testing.assert_close(prepared, expected, atol=1.2 * level, rtol=0)


def test_image_similarity_is_that_of_transformers(tmp_path: Path):
    model = make_clip("gelu")
    images, files = draw_pictures(5, SIZE, SIZE)
    _, embeddings = run_transformers_clip(model, files)
    similarity = CLIPImageSimilarity(str(save_open_clip(model, tmp_path / "clip"))).score(
        images, images.flip(0), PROMPTS
    )
    torch.testing.assert_close(
        similarity, (embeddings * embeddings.flip(0)).sum(1), atol=1e-5, rtol=0
    )


def test_an_image_is_most_like_itself(tmp_path: Path):
    metric = CLIPImageSimilarity(str(save_open_clip(make_clip("gelu"), tmp_path / "clip")))
    images, _ = draw_pictures(5, 48, 48)
    torch.testing.assert_close(metric.score(images, images, PROMPTS), torch.ones(5))
    assert metric.score(images, images.flip(0), PROMPTS)[0] < 0.999
    assert metric.compares_to_reference


def test_prompts_that_are_cut_are_counted(tmp_path: Path):
    metric = CLIPScore(str(save_open_clip(make_clip("gelu"), tmp_path / "clip")))
    fits, cut = "cat " * 75, "cat " * 76  # with start and end token the first has 77 tokens
    assert len(make_tokenizer()(fits).input_ids) == 77
    assert (
        metric.describe_cut_prompts([fits, cut, "a cat", cut, ""])
        == "2 of 5 prompts were cut at 77 tokens"
    )
    assert metric.describe_cut_prompts([fits, "a cat"]) == ""


def test_about_names_source_backbone_and_preprocessing(tmp_path: Path):
    folder = save_open_clip(make_clip("gelu"), tmp_path / "clip")
    about = CLIPScore(str(folder)).about
    assert f"of {folder} in open_clip 3" in about
    assert "ViT (2 layers, width 32, patch 8, 32 pixels, GELU)" in about
    assert "shortest side to its size, bicubic, centre crop" in about


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("open_clip_model.safetensors", b"\x08" + bytes(15), "is not a CLIP in open_clip's layout"),
        ("open_clip_config.json", b"{}", "missing 'model_cfg'"),
    ],
)
def test_a_broken_folder_is_refused(tmp_path: Path, name: str, content: bytes, message: str):
    folder = save_open_clip(make_clip("gelu"), tmp_path / "clip")
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        CLIPScore(str(folder))


def test_weights_of_another_model_are_refused_by_name(tmp_path: Path):
    folder = save_open_clip(make_clip("gelu"), tmp_path / "clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["layers"] = 3
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"visual\.transformer\.resblocks\.2\.ln_1\.weight"
    ) as error:
        CLIPScore(str(folder))
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
