"""Tools for testing adapters: tiny configs, and the verification of units."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, SanaTransformer2DModel, SD3Transformer2DModel
from torch import nn

from benchmarks.published import PUBLISHED
from fp4dit.models.blocks import Unit
from fp4dit.models.pixart import PixArt, PixArtAdapter
from fp4dit.models.testing import make_tiny_config, verify_adapter
from fp4dit.utils import calls
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.helpers import tiny


def forget_text_mask(unit: Unit) -> Unit:
    """Return a block's unit that attends to padding tokens, too."""
    make_call = unit.make_call
    return replace(
        unit, make_call=lambda s: make_call({**s, "bias": torch.zeros(len(s["text"]), 1, 20)})
    )


class ForgetfulAdapter(PixArtAdapter):
    """Adapter whose blocks ignore the mask of the text."""

    def units(self) -> list[Unit]:
        units = super().units()
        return [forget_text_mask(unit) if "blocks" in unit.module else unit for unit in units]


def record_call(adapter: PixArtAdapter) -> Call:
    with calls.record_calls(adapter.transformer) as recorded:
        adapter.sample(tiny.PROMPTS[:2], [5, 6], 2, 4.5)
    return recorded[1]


@torch.no_grad()
def test_verification_names_the_first_wrong_unit(tmp_path: Path):
    tiny.save(tmp_path)
    adapter = PixArt(str(tmp_path), tokens=20).load()
    call = record_call(adapter)  # pyright: ignore[reportArgumentType]
    verify_adapter(adapter, call)
    message = r"transformer_blocks\.0 of PixArtTransformer2DModel, called alone, gives another"
    with pytest.raises(UserError, match=message):
        verify_adapter(ForgetfulAdapter(adapter.transformer, 20, adapter.pipe), call)


CONFIGS: dict[str, tuple[Callable, dict]] = {  # in addition to those of benchmarks.published
    "sd3": (SD3Transformer2DModel, {"caption_projection_dim": 1152, "qk_norm": "rms_norm"}),
    "flux": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "sana": (SanaTransformer2DModel, {}),
}


@pytest.mark.parametrize("model", [*CONFIGS, *PUBLISHED])
def test_a_tiny_config_has_the_structure_of_the_model(model: str):
    model_class, config = (CONFIGS | PUBLISHED)[model]
    with init_empty_weights():
        original = model_class(**config)
        tiny_model = model_class.from_config(make_tiny_config(original.config))
    assert describe_modules(tiny_model) == describe_modules(original)
    assert sum(parameter.numel() for parameter in tiny_model.parameters()) < 1e6


def describe_modules(model: nn.Module) -> set[tuple[str, str]]:
    """Return the name, without numbers, and the class of each module."""
    modules = set()
    for name, module in model.named_modules():
        modules.add((re.sub(r"\d+", "n", name), type(module).__name__))
    return modules
