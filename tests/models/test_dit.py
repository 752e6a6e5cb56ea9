"""DiT: prompts are classes."""

import pytest
import torch

from fp4dit.models.dit_xl import DiT, DiTAdapter
from fp4dit.utils.errors import UserError
from tests.helpers import tiny


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> DiTAdapter:
    folder = tmp_path_factory.mktemp("dit")
    tiny.save_dit(folder)
    return DiT(str(folder)).load()  # pyright: ignore[reportReturnType]


def test_classes_are_numbers_or_names(dit: DiTAdapter):
    expected = {"tench": 0, "Tinca tinca": 0, "goldfish": 1, "0": 0, "999": 999}
    assert {prompt: dit.parse_class(prompt) for prompt in expected} == expected
    by_name, by_number = (dit.sample([prompt], [3], 2, 4.0) for prompt in ("Tinca tinca", "0"))
    assert torch.equal(by_name, by_number)


@pytest.mark.parametrize("prompt", ["1000", "-1", "goldfisch", "a red square"])
def test_an_unknown_class_is_refused(dit: DiTAdapter, prompt: str):
    message = f"^'{prompt}' is not a class: give a number below 1000, or a name"
    with pytest.raises(UserError, match=message):
        dit.sample([prompt], [0], 2, 4.0)


def test_an_unknown_class_gets_a_hint(dit: DiTAdapter):
    with pytest.raises(UserError, match="such as 'goldfish'"):
        dit.parse_class("goldfisch")
