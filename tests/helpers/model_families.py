"""Tiny replicas of every model family, and how a run with each is configured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fp4dit.models.base import PipelineSource
from fp4dit.models.dit_xl import DiT
from fp4dit.models.generic import Generic
from fp4dit.models.hunyuan import Hunyuan
from fp4dit.models.pixart import PixArt
from fp4dit.quantization.rules import Rule
from tests.helpers import tiny

SMALL_IMAGE = {"height": 32, "width": 32}
SANA_OPTIONS = SMALL_IMAGE | {
    "use_resolution_binning": False,
    "complex_human_instruction": None,
    "clean_caption": False,
}
GROUPS_OF_32 = ["weight.granularity.size=32"]


@dataclass(frozen=True)
class ModelFamily:
    """Model family with a tiny replica.

    Args:
        save: Saves the replica in a folder.
        make_source: Makes the source of the replica in a folder.
        overrides: The overrides of a run with the replica.
    """

    save: Callable[[Path], None]
    make_source: Callable[[str], PipelineSource]
    overrides: Sequence[str]


def make_generic_family(
    save: Callable[[Path], None], options: Mapping[str, Any], *overrides: str
) -> ModelFamily:
    """Make a family that uses `model=generic` with some options of the pipeline."""
    options_overrides = []
    for name, value in options.items():
        options_overrides.append(f"+model.options.{name}={'null' if value is None else value}")
    return ModelFamily(
        save,
        partial(Generic, options=options),
        ["model=generic", *options_overrides, *GROUPS_OF_32, *overrides],
    )


FAMILIES = {
    "alpha": ModelFamily(
        tiny.save_alpha,
        partial(PixArt, tokens=20),
        ["model=pixart_alpha", "model.tokens=20", "weight.granularity.size=16"],
    ),
    "hunyuan": ModelFamily(tiny.save_hunyuan, Hunyuan, ["model=hunyuan", *GROUPS_OF_32]),
    "hunyuan_v1_2": ModelFamily(
        partial(tiny.save_hunyuan, conditions=False), Hunyuan, ["model=hunyuan_v1_2", *GROUPS_OF_32]
    ),
    "dit": ModelFamily(tiny.save_dit, DiT, ["model=dit_xl_2", *GROUPS_OF_32]),
    "sd3": make_generic_family(tiny.save_sd3, SMALL_IMAGE),
    "flux": make_generic_family(tiny.save_flux, SMALL_IMAGE),
    "sana": make_generic_family(
        tiny.save_sana,
        SANA_OPTIONS,
        "+activation.ignore=['*.attn1.[qkv]']",
    ),
}


def make_weight_rules(model: nn.Module) -> list[Rule]:
    """Make rules for 4-bit weights with one scale per output channel.

    HunyuanDiT calls some of its other layers in pieces, so only its blocks are quantized.
    """
    quantizer = tiny.rules()[0].quantizer
    ignore = Rule("*.conv_depth", None, optional=True)
    return [ignore, Rule("blocks.*" if hasattr(model, "blocks") else "*", quantizer)]
