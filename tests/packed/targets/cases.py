"""Tiny models for each target, with layers of all kinds that it stores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale, PowerOfTwoNVFP4Scale
from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.targets.auto_round import AutoRound
from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.bfl import BFL
from fp4dit.packed.targets.comfyui import ComfyUI
from fp4dit.packed.targets.conversion import export_folder
from fp4dit.packed.targets.gguf import GGUF
from fp4dit.packed.targets.nunchaku import NunchakuLite
from fp4dit.packed.targets.sdnq import SDNQ
from fp4dit.packed.targets.torchao import TorchAO
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.low_rank import LowRankBF16
from fp4dit.transforms.smoothing import PowerOfTwoSmoothingSearch
from tests.helpers import tiny
from tests.helpers.packing import pack_model
from tests.packed.targets.layers import BF16


@dataclass(frozen=True)
class Case:
    """A target with a model that it stores.

    Attributes:
        target: The target.
        rules: Rules for the weights.
        dtype: The dtype of the model.
        package: The module that readers need.
        build: The function that builds the plain model.
        inputs: Rules for the inputs of layers.
    """

    target: Target
    rules: Sequence[Rule]
    dtype: torch.dtype
    package: str
    build: Callable[[], Any] = tiny.transformer
    inputs: Sequence[Rule] = ()

    def save(self, folder: Path) -> Any:
        """Save the packed model in `ours` and the exported one in `theirs`, and return it."""
        model = pack_model(self.rules, self.inputs, self.dtype, self.build())
        model.save_pretrained(folder / "ours")
        export_folder(str(folder / "ours"), str(folder / "theirs"), self.target)
        return model


def build_flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


def build_wide_flux() -> FluxTransformer2DModel:
    """Build a FLUX whose layers are of whole tiles of 128."""
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(16, 24, 24),
    )


def group(fmt: Any, size: int, scale: Any = None) -> Quantizer:
    return Quantizer(fmt, PerGroup(size), scale or AbsMax(fp16))


INT4 = integer(4)
KEPT = [Rule("*x_embedder", None), Rule("*time_text_embed*", None)]  # inputs of other widths

CASES = {
    "sdnq": Case(
        SDNQ(),
        [
            Rule("*ff*", group(floating(3, 0), 32)),
            Rule("*attn2*", group(integer(4, signed=False), 16, MinMax(fp16))),
            Rule("pos_embed.proj", Quantizer(integer(8), PerChannel(), AbsMax(fp16))),
            Rule("*adaln*", Quantizer(floating(4, 3, reserved=1), PerChannel(), AbsMax(fp16))),
            Rule("proj_out", None),
            Rule("*", group(floating(2, 1), 16)),
        ],
        torch.float32,
        "sdnq",
    ),
    "sdnq in bf16": Case(
        SDNQ(),
        [
            Rule("*ff*", group(floating(1, 2), 32, AbsMax(BF16))),
            Rule("*attn2*", Quantizer(floating(5, 2, reserved=4), PerChannel(), AbsMax(BF16))),
            Rule("pos_embed.proj", None),
            Rule("*", group(INT4, 16, AbsMax(BF16))),
        ],
        torch.bfloat16,
        "sdnq",
    ),
    "auto_round": Case(
        AutoRound(),
        [
            Rule("pos_embed.proj", None),
            Rule("*linear_1", None),
            Rule("*ff*", group(integer(4, signed=False), 32, MinMax(fp16))),
            Rule("*attn2*", Quantizer(integer(8), PerChannel(), AbsMax(fp16))),
            Rule("*", group(INT4, 32)),
        ],
        torch.float16,
        "auto_round",
    ),
    "auto_round in bf16": Case(
        AutoRound(),
        [
            Rule("pos_embed.proj", None),
            Rule("*", group(INT4, 32, AbsMax(BF16))),
        ],
        torch.bfloat16,
        "auto_round",
    ),
    "bfl": Case(
        BFL(),
        [
            *KEPT,
            Rule("*attn*", Quantizer(floating(4, 3, reserved=1), PerChannel(), AbsMax())),
            Rule("*norm*", group(floating(2, 1), 16, NVFP4Scale(256.0, (1.0, 1.5)))),
            Rule("*", group(floating(2, 1), 16, NVFP4Scale())),
        ],
        torch.bfloat16,
        "diffusers",
        build_flux,
    ),
    "torchao": Case(
        TorchAO(),
        [
            Rule("pos_embed.proj", None),
            Rule("*attn1*", group(INT4, 32, AbsMax(BF16))),
            Rule("*attn2*", group(integer(8, signed=False), 16, MinMax(BF16))),
            Rule("*", group(floating(2, 1), 16, NVFP4Scale())),
        ],
        torch.bfloat16,
        "torchao",
    ),
    "gguf": Case(
        GGUF(),
        [
            *KEPT,
            Rule("*attn*", group(integer(8), 32)),
            Rule("*", group(INT4, 32)),
        ],
        torch.float16,
        "gguf",
        build_flux,
    ),
    "gguf in bf16": Case(
        GGUF(),
        [*KEPT, Rule("*", group(INT4, 32, AbsMax(BF16)))],
        torch.bfloat16,
        "gguf",
        build_flux,
    ),
}

SMOOTH_LOW_RANK = (PowerOfTwoSmoothingSearch(4), LowRankBF16(16, 2))
NVFP4_POWER_OF_TWO = group(floating(2, 1), 16, PowerOfTwoNVFP4Scale())
TILED_INT4 = group(INT4, 64, AbsMax(BF16))
TILED = [*KEPT, Rule("proj_out", None), Rule("*norm*", TILED_INT4)]

# Readers need a GPU for these.
NUNCHAKU = {
    "int4": Case(
        NunchakuLite(),
        [*TILED, Rule("*ff*", TILED_INT4), Rule("*", TILED_INT4, SMOOTH_LOW_RANK)],
        torch.bfloat16,
        "kernels",
        build_wide_flux,
        [Rule("*.ff.*", Quantizer(INT4, PerToken(), AbsMax())), Rule("*", None)],
    ),
    "nvfp4": Case(
        NunchakuLite(rank=48),
        [*TILED, Rule("*ff*", NVFP4_POWER_OF_TWO), Rule("*", NVFP4_POWER_OF_TWO, SMOOTH_LOW_RANK)],
        torch.bfloat16,
        "kernels",
        build_wide_flux,
    ),
}

# diffusers does not read this.
COMFYUI = Case(
    ComfyUI(),
    [
        *TILED[:-1],
        Rule("*norm*", Quantizer(integer(8), PerChannel(), AbsMax())),
        Rule("*ff*", group(floating(4, 3, reserved=1), 32, E8M0Scale())),
        Rule("*", NVFP4_POWER_OF_TWO),
    ],
    torch.bfloat16,
    "comfy_kitchen",
    build_wide_flux,
)
