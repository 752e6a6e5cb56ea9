"""The published models as they are built, for random weights to be put in: each transformer's config.json on the hub.

And what their pipelines hand to them, and the rest of PixArt-alpha's pipeline but for its text encoder.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    HunyuanDiT2DModel,
    ModelMixin,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn

from fp4dit.models.checkpoint import Adapter

PIXART = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
}
HUNYUAN = {
    "num_attention_heads": 16,
    "attention_head_dim": 88,
    "hidden_size": 1408,
    "cross_attention_dim": 1024,
    "cross_attention_dim_t5": 2048,
    "pooled_projection_dim": 1024,
    "text_len": 77,
    "text_len_t5": 256,
    "in_channels": 4,
    "learn_sigma": True,
    "mlp_ratio": 4.3637,
    "num_layers": 40,
    "patch_size": 2,
    "sample_size": 128,
}
DIT = {"num_attention_heads": 16, "attention_head_dim": 72, "out_channels": 8, "num_layers": 28, "patch_size": 2}
PUBLISHED: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "pixart_alpha": (PixArtTransformer2DModel, PIXART | {"sample_size": 128, "use_additional_conditions": True}),
    "pixart_alpha_512": (PixArtTransformer2DModel, PIXART | {"sample_size": 64}),
    "pixart_sigma": (PixArtTransformer2DModel, PIXART | {"sample_size": 128, "use_additional_conditions": False}),
    "pixart_sigma_512": (PixArtTransformer2DModel, PIXART | {"sample_size": 64, "use_additional_conditions": False}),
    "pixart_sigma_2k": (PixArtTransformer2DModel, PIXART | {"sample_size": 256, "use_additional_conditions": False}),
    "hunyuan": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_1": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_2": (HunyuanDiT2DModel, HUNYUAN | {"use_style_cond_and_image_meta_size": False}),
    "dit_xl_2": (DiTTransformer2DModel, DIT | {"sample_size": 32}),
    "dit_xl_2_512": (DiTTransformer2DModel, DIT | {"sample_size": 64}),
}
AUTOENCODER = {  # stabilityai/sd-vae-ft-ema, which PixArt-alpha has
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def build(model: str, **changed: Any) -> nn.Module:
    kind, config = PUBLISHED[model]
    return kind(**config | changed)  # pyright: ignore[reportReturnType]


def pipeline(model: str, dtype: torch.dtype) -> PixArtAlphaPipeline:
    """PixArt-alpha without its text encoder, of 4.7 billion parameters."""
    parts = {"vae": AutoencoderKL(**AUTOENCODER), "transformer": build(model)}
    parts = {name: nn.Module.to(part, dtype) for name, part in parts.items()}  # diffusers' own warns
    return PixArtAlphaPipeline(None, None, scheduler=DPMSolverMultistepScheduler(), **parts)  # pyright: ignore


def given(pipeline: Adapter) -> Mapping[str, Tensor]:
    """A row of what the transformer is given: numbers at random, halfway, with no text masked."""

    def filled(empty: Tensor) -> Tensor:
        kind = empty.dtype
        return (
            torch.randn(empty.shape).to(kind)
            if kind.is_floating_point
            else torch.full_like(empty, kind == torch.bool, device="cpu")
        )

    state = {name: filled(row[0]) for name, row in pipeline.begin(pipeline.blank(1)).items()}
    return state | {"timestep": torch.full_like(state["timestep"], 500)}
