"""Build published models with random weights, from the config.json that each has on the hub.

There are also the inputs of their transformers, and PixArt-alpha's pipeline without text encoder.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
import yaml
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
from fp4dit.models.hub_files import TRANSFORMER_CONFIG, read_config
from pipelines.config.resolvers import CONF, list_options

# The class of a transformer, by its `norm_type`. Most of these models were saved when one class of
# diffusers, Transformer2DModel, served them all.
CLASSES: dict[str, type[ModelMixin]] = {
    "ada_norm_single": PixArtTransformer2DModel,
    "ada_norm_zero": DiTTransformer2DModel,
    "layer_norm": HunyuanDiT2DModel,
}


def is_traced(option: str) -> bool:
    """Return whether a file of `conf/model` is for `generic`, or based on it."""
    defaults = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text()).get("defaults", [])
    bases = [name for name in defaults if name in list_options("model")]
    return option == "generic" or any(map(is_traced, bases))


def read_published(option: str) -> tuple[type[ModelMixin], dict[str, Any]]:
    """Return the class of a transformer and its arguments, from the config that it has on the hub.

    Args:
        option: A file of `conf/model`.
    """
    path = yaml.safe_load((CONF / "model" / f"{option}.yaml").read_text())["model"]["path"]
    config = read_config(path, TRANSFORMER_CONFIG)
    model_class = CLASSES[config["norm_type"]]
    if model_class is PixArtTransformer2DModel:
        # diffusers decides so where the config does not, and a smaller copy has another size.
        config.setdefault("use_additional_conditions", config["sample_size"] == 128)
    parameters = signature(model_class.__init__).parameters
    return model_class, {name: value for name, value in config.items() if name in parameters}


# Those that have an adapter of their own.
PUBLISHED: dict[str, tuple[type[ModelMixin], dict[str, Any]]] = {
    option: read_published(option)
    for option in list_options("model")
    if option not in ("emoji", "shapes") and not is_traced(option)
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
