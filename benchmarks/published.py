"""Build published models with random weights, from the config.json that each has on the hub.

There are also the inputs of their transformers, and PixArt-alpha's pipeline without text encoder.
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

from fp4dit.models.adapter import TransformerAdapter

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
DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
}
PUBLISHED: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    "pixart_alpha": (
        PixArtTransformer2DModel,
        PIXART | {"sample_size": 128, "use_additional_conditions": True},
    ),
    "pixart_alpha_512": (PixArtTransformer2DModel, PIXART | {"sample_size": 64}),
    "pixart_sigma": (
        PixArtTransformer2DModel,
        PIXART | {"sample_size": 128, "use_additional_conditions": False},
    ),
    "pixart_sigma_512": (
        PixArtTransformer2DModel,
        PIXART | {"sample_size": 64, "use_additional_conditions": False},
    ),
    "pixart_sigma_2k": (
        PixArtTransformer2DModel,
        PIXART | {"sample_size": 256, "use_additional_conditions": False},
    ),
    "hunyuan": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_1": (HunyuanDiT2DModel, HUNYUAN),
    "hunyuan_v1_2": (HunyuanDiT2DModel, HUNYUAN | {"use_style_cond_and_image_meta_size": False}),
    "dit_xl_2": (DiTTransformer2DModel, DIT | {"sample_size": 32}),
    "dit_xl_2_512": (DiTTransformer2DModel, DIT | {"sample_size": 64}),
}
AUTOENCODER = {  # stabilityai/sd-vae-ft-ema, the autoencoder of PixArt-alpha
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 256,
}


def build_random_transformer(model: str, **changed: Any) -> nn.Module:
    """Build a transformer with random weights. `changed` are entries of its config."""
    kind, config = PUBLISHED[model]
    return kind(**config | changed)  # pyright: ignore[reportReturnType]


def build_pixart_pipeline(model: str, dtype: torch.dtype) -> PixArtAlphaPipeline:
    """Build the pipeline of PixArt-alpha without its text encoder of 4.7 billion parameters."""
    parts = {"vae": AutoencoderKL(**AUTOENCODER), "transformer": build_random_transformer(model)}
    # The `to` of diffusers warns about unused dtypes.
    parts = {name: nn.Module.to(part, dtype) for name, part in parts.items()}
    return PixArtAlphaPipeline(None, None, scheduler=DPMSolverMultistepScheduler(), **parts)  # pyright: ignore


def make_random_inputs(pipeline: TransformerAdapter) -> Mapping[str, Tensor]:
    """Return one row of random inputs of the transformer, halfway through, with no text masked."""

    def fill_randomly(empty: Tensor) -> Tensor:
        if empty.dtype.is_floating_point:
            return torch.randn(empty.shape).to(empty.dtype)
        return torch.full_like(empty, empty.dtype == torch.bool, device="cpu")

    state = {
        name: fill_randomly(row[0])
        for name, row in pipeline.initial_state(pipeline.meta_call(1)).items()
    }
    return state | {"timestep": torch.full_like(state["timestep"], 500)}
