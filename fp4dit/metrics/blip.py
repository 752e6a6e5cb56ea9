"""The network of ImageReward: BLIP's image encoder, its text encoder that attends to the image, and a linear head.

Its authors' package (image-reward 1.5) needs timm and transformers of 2023. Here BLIP is transformers' own, and the
published weights are put under its names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.blip import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from fp4dit.metrics.checkpoint import fill, tensors

PARTS = {"blip.visual_encoder.": "vision.", "blip.text_encoder.": "text.", "mlp.layers.": "head."}
VISION = {  # timm's names of a vision transformer's parts, and transformers'; the text encoder's are the same
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks": "encoder.layers",
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "norm": "post_layernorm",
}


@dataclass(frozen=True)
class Sizes:
    """Of a ViT-L/16, and of BERT-base with cross-attention (the published med_config.json)."""

    pixels: int = 224
    width: int = 1024
    depth: int = 24
    heads: int = 16
    words: int = 30524
    positions: int = 512
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12


class Reward(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision(sizes))
        self.text = BlipTextModel(text(sizes), add_pooling_layer=False)
        head: list[nn.Module] = [nn.Linear(*pair) for pair in pairwise((sizes.text_width, 1024, 128, 64, 16, 1))]
        for place in (1, 3, 5):
            head.insert(place, nn.Identity())  # a dropout's, which the published names count
        self.head = nn.Sequential(*head)

    def forward(
        self, pixels: Float[Tensor, "n 3 h w"], ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"]
    ) -> Float[Tensor, " n"]:
        patches = self.vision(pixels).last_hidden_state
        read = self.text(ids, attention_mask=mask, encoder_hidden_states=patches).last_hidden_state
        return self.head(read[:, 0]).squeeze(1)


def vision(sizes: Sizes) -> BlipVisionConfig:
    return BlipVisionConfig(
        image_size=sizes.pixels,
        patch_size=16,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        layer_norm_eps=1e-6,
    )


def text(sizes: Sizes) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=sizes.words,
        max_position_embeddings=sizes.positions,
        hidden_size=sizes.text_width,
        encoder_hidden_size=sizes.width,
        intermediate_size=4 * sizes.text_width,
        num_hidden_layers=sizes.text_depth,
        num_attention_heads=sizes.text_heads,
        layer_norm_eps=1e-12,
    )


def load(path: Path, sizes: Sizes) -> nn.Module:
    """Filled with the file's own tensors: no second copy of 1.8 GB.

    Raises:
        UserError: if they are another model's.
    """
    with init_empty_weights():
        model = Reward(sizes)
    return fill(model, renamed(tensors(path)), path)


def renamed(published: Any) -> dict[str, Tensor]:
    """Without what no score is made of: BLIP's projections, and the position numbers that transformers once stored."""
    state = published if isinstance(published, Mapping) else {}
    names = {name: ours(name) for name in state if not str(name).endswith(".position_ids")}
    return {name: state[theirs] for theirs, name in names.items() if name}


def ours(published: Any) -> str | None:
    """None if it is of no use here."""
    for prefix, part in PARTS.items():
        if isinstance(published, str) and published.startswith(prefix):
            name = published.removeprefix(prefix)
            return part + (re.sub("|".join(VISION), renaming, name) if part == "vision." else name)
    return None


def renaming(found: re.Match[str]) -> str:
    return VISION[found[0]]
