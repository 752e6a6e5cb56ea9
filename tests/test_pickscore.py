"""PickScore against transformers' own forward pass and tokenizer, as its authors ask them."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPModel

from fp4dit.errors import UserError
from fp4dit.metrics.pickscore import PickScore, Words
from tests.tiny_clip import PROMPTS, SIZE, clip, pictures, tokenizer

CURLY = ["“Curly” quotes — and 多 …", *PROMPTS[1:]]  # open_clip's tokenizer would straighten them


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pickscore")
    clip("gelu").save_pretrained(folder)
    tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def metric(saved: Path) -> PickScore:
    return PickScore(str(saved), {"path": str(saved / "tokenizer" / "tokenizer.json")})


def test_scores_are_the_logits_of_transformers(metric: PickScore, saved: Path):
    images, files = pictures(5, SIZE, SIZE)
    size = {"height": SIZE, "width": SIZE}
    pixels = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)(files, return_tensors="pt")
    text = tokenizer()(CURLY, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = CLIPModel.from_pretrained(saved).eval()(**text, **pixels).logits_per_image.diagonal()
    torch.testing.assert_close(metric.score(images, images, CURLY), expected, atol=1e-4, rtol=1e-5)
    assert expected.std() > 0.1


def test_prompts_are_read_as_transformers_does(saved: Path):
    words = Words(str(saved / "tokenizer" / "tokenizer.json"))
    for prompts in (CURLY, ["cat " * 74, "cat " * 75, "cat " * 76]):
        expected = tokenizer()(prompts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        assert words(prompts, 77).tolist() == expected.input_ids.tolist()


def test_note_and_about(metric: PickScore, saved: Path):
    assert metric.note(CURLY) == "1 of 5 prompts were cut at 77 tokens"
    assert metric.note(["cat " * 75]) == ""
    assert f"exp(logit scale) cos, of {saved} in transformers 5" in metric.about
    assert "ViT (2 layers, width 32, patch 8, 32 pixels)" in metric.about


@pytest.mark.parametrize("spoil", ["config.json", "model.safetensors"])
def test_a_broken_folder_is_refused(saved: Path, tmp_path: Path, spoil: str):
    for path in saved.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes()[: 100 if path.name == spoil else None])
    with pytest.raises(UserError, match="is no CLIP in transformers' layout"):
        PickScore(str(tmp_path), {"path": ""})


def test_weights_of_another_model_are_refused(saved: Path, tmp_path: Path):
    for path in saved.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match=r"it lacks text_model\.encoder\.layers\.2\..* \(32 in all\)"):
        PickScore(str(tmp_path), {"path": ""})


def test_what_is_missing_or_broken_is_named(saved: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"^there is nothing at /nowhere$"):
        PickScore("/nowhere", {"path": ""})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read as a tokenizer\.json"):
        PickScore(str(saved), {"path": str(tmp_path / "tokenizer.json")})
