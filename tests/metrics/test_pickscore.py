"""PickScore agrees with the forward pass and tokenizer of transformers, which its authors use."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel

from fp4dit.metrics.pickscore import CLIPTokenizer, PickScore
from fp4dit.utils.errors import UserError
from tests.helpers.tiny_clip import PROMPTS, SIZE, draw_pictures, make_clip, make_tokenizer

CURLY = ["“Curly” quotes — and 多 …", *PROMPTS[1:]]  # open_clip's tokenizer would straighten them


@pytest.fixture(scope="module")
def pickscore_folder(tmp_path_factory) -> Path:
    """Save a tiny CLIP and its tokenizer in transformers' layout."""
    folder = tmp_path_factory.mktemp("pickscore")
    make_clip("gelu").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def pickscore(pickscore_folder: Path) -> PickScore:
    return PickScore(
        str(pickscore_folder), {"path": str(pickscore_folder / "tokenizer" / "tokenizer.json")}
    )


def test_scores_are_the_logits_of_transformers(pickscore: PickScore, pickscore_folder: Path):
    images, files = draw_pictures(5, SIZE, SIZE)
    size = {"height": SIZE, "width": SIZE}
    pixels = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)(
        files, return_tensors="pt"
    )
    text = make_tokenizer()(
        CURLY, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = (
            CLIPModel.from_pretrained(pickscore_folder)
            .eval()(**text, **pixels)
            .logits_per_image.diagonal()
        )
    torch.testing.assert_close(
        pickscore.score(images, images, CURLY), expected, atol=1e-4, rtol=1e-5
    )
    assert expected.std() > 0.1


def test_prompts_are_read_as_transformers_does(pickscore_folder: Path):
    words = CLIPTokenizer(str(pickscore_folder / "tokenizer" / "tokenizer.json"))
    for prompts in (CURLY, ["cat " * 74, "cat " * 75, "cat " * 76]):
        expected = make_tokenizer()(
            prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt"
        )
        assert words(prompts, 77).tolist() == expected.input_ids.tolist()


def test_note_and_about(pickscore: PickScore, pickscore_folder: Path):
    assert pickscore.describe_cut_prompts(CURLY) == "1 of 5 prompts were cut at 77 tokens"
    assert pickscore.describe_cut_prompts(["cat " * 75]) == ""
    assert f"exp(logit scale) cos, of {pickscore_folder} in transformers 5" in pickscore.about
    assert "ViT (2 layers, width 32, patch 8, 32 pixels)" in pickscore.about


@pytest.mark.parametrize("broken_file", ["config.json", "model.safetensors"])
def test_a_broken_folder_is_refused(pickscore_folder: Path, tmp_path: Path, broken_file: str):
    for path in pickscore_folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(
            path.read_bytes()[: 100 if path.name == broken_file else None]
        )
    with pytest.raises(UserError, match="is not a CLIP in transformers' layout"):
        PickScore(str(tmp_path), {"path": ""})


def test_weights_of_another_model_are_refused(pickscore_folder: Path, tmp_path: Path):
    for path in pickscore_folder.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    with pytest.raises(
        UserError, match=r"it lacks text_model\.encoder\.layers\.2\..* \(32 in all\)"
    ):
        PickScore(str(tmp_path), {"path": ""})


def test_missing_and_broken_files_are_named(pickscore_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^there is nothing at /nowhere$"):
        PickScore("/nowhere", {"path": ""})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer\.json"):
        PickScore(str(pickscore_folder), {"path": str(tmp_path / "tokenizer.json")})
