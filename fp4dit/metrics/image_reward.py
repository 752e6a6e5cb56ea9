"""ImageReward (arXiv:2304.05977): a model of how people rate an image, given its prompt.

The reward is read from the prompt's [CLS] token. BLIP replaces it by [ENC] when it matches texts
with images, but the authors' code does not.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from jaxtyping import Float, Int
from open_clip.transform import PreprocessCfg
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers.models.blip import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.metrics.clip_backbone import make_preprocess
from fp4dit.metrics.loading import load_into, load_tensors
from fp4dit.utils.errors import UserError
from fp4dit.utils.hub import require_weights

MAX_TOKENS = 35  # of a prompt, [CLS] and [SEP] included

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the network's outputs, by the authors

# Prefixes of the published names, and ours.
PREFIXES = {
    "blip.visual_encoder.": "vision.",
    "blip.text_encoder.": "text.",
    "mlp.layers.": "head.",
}

# timm's names of the parts of a vision transformer, and transformers'. The text encoder's agree.
VISION_NAMES = {
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
class RewardSizes:
    """Sizes of the network: a ViT-L/16, and BERT-base with cross-attention (med_config.json).

    Attributes:
        pixels: Side of the square image; a multiple of 16, the side of a patch.
        width: Width of the image encoder.
        depth: Number of layers of the image encoder.
        heads: Number of attention heads of the image encoder.
        words: Number of tokens of the vocabulary, with BLIP's two additions.
        positions: Largest number of tokens that have a position.
        text_width: Width of the text encoder.
        text_depth: Number of layers of the text encoder.
        text_heads: Number of attention heads of the text encoder.
    """

    pixels: int = 224
    width: int = 1024
    depth: int = 24
    heads: int = 16
    words: int = 30524
    positions: int = 512
    text_width: int = 768
    text_depth: int = 12
    text_heads: int = 12


class ImageReward(PerImageMetric):
    """Standardized reward: negative for images that are worse than average.

    Args:
        path: The published ImageReward.pt, as `fp4dit.utils.hub` finds it.
        tokenizer: `path` of BERT's tokenizer.json.
        sizes: Sizes of the network.

    Example:
        >>> metric = ImageReward("/path/of/ImageReward.pt", {"path": "/path/of/tokenizer.json"})
        >>> metric.score(images, images, ["a cat", "a dog"])
        tensor([0.93, 0.41])
    """

    title, digits, higher_is_better = "ImageReward", 3, True

    def __init__(
        self, path: str, tokenizer: Mapping[str, str], sizes: RewardSizes = RewardSizes()
    ) -> None:
        super().__init__()
        self.tokenizer = load_bert_tokenizer(tokenizer["path"], sizes.words)
        self.model = load_reward(require_weights(path), sizes)
        # It differs from the authors' preparation by their rounding to 8 bits: by 0.3 of 255 levels
        # on average, and by up to 20 at hard edges. There PIL clips the overshoot between its two
        # passes, and here it is clipped after both.
        self.preprocess = make_preprocess(PreprocessCfg(sizes.pixels))
        self.about = (
            f"ImageReward of {path} in transformers {transformers.__version__}; images resized to "
            f"{sizes.pixels} by an antialiasing bicubic filter; up to {MAX_TOKENS} tokens of a "
            f"prompt, by {tokenizer['path']}"
        )

    @torch.no_grad()
    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        encodings = self.tokenizer.encode_batch(list(prompts))
        ids = torch.tensor([encoding.ids for encoding in encodings], device=images.device)
        masks = [encoding.attention_mask for encoding in encodings]
        mask = torch.tensor(masks, device=images.device)
        return (self.model(self.preprocess(images), ids, mask) - MEAN) / STD

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        encodings = self.tokenizer.encode_batch(list(prompts))
        count = sum(bool(encoding.overflowing) for encoding in encodings)
        if not count:
            return ""
        return f"reads only the first {MAX_TOKENS} tokens of {count} of {len(prompts)} prompts"


class RewardNetwork(nn.Module):
    """Map an image and its prompt to a reward, which is not standardized yet.

    Args:
        sizes: Sizes of the network.

    Example:
        >>> sizes = RewardSizes(32, width=64, depth=1, heads=2, text_width=48, text_depth=1)
        >>> ids = torch.tensor([[101, 1037, 4937, 102]] * 8)
        >>> RewardNetwork(sizes)(torch.zeros(8, 3, 32, 32), ids, torch.ones_like(ids)).shape
        torch.Size([8])
    """

    def __init__(self, sizes: RewardSizes) -> None:
        super().__init__()
        self.vision = BlipVisionModel(make_vision_config(sizes))
        self.text = BlipTextModel(make_text_config(sizes), add_pooling_layer=False)
        widths = (sizes.text_width, 1024, 128, 64, 16, 1)
        head: list[nn.Module] = [nn.Linear(*pair) for pair in pairwise(widths)]
        for index in (1, 3, 5):
            head.insert(index, nn.Identity())  # a dropout, which the published names count
        self.head = nn.Sequential(*head)

    def forward(
        self, pixels: Float[Tensor, "n 3 h w"], ids: Int[Tensor, "n t"], mask: Int[Tensor, "n t"]
    ) -> Float[Tensor, " n"]:
        patches = self.vision(pixels).last_hidden_state
        hidden = self.text(
            ids, attention_mask=mask, encoder_hidden_states=patches
        ).last_hidden_state
        return self.head(hidden[:, 0]).squeeze(1)


def load_reward(path: Path, sizes: RewardSizes) -> nn.Module:
    """Load the published weights. The 1.8 GB are in memory once.

    Raises:
        UserError: if they are another model's.
    """
    with init_empty_weights():
        model = RewardNetwork(sizes)
    return load_into(model, rename_reward_weights(load_tensors(path)), path)


def load_bert_tokenizer(spec: str, count: int) -> Tokenizer:
    """Load BERT's tokenizer with BLIP's two additional words, for which the embedding has rows.

    Args:
        spec: Location of tokenizer.json, as `fp4dit.utils.hub` finds it.
        count: Expected number of words, additions included.

    Raises:
        UserError: if it is not a tokenizer with so many words.
    """
    file = require_weights(spec)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers has no class of its own for a broken file
        raise UserError(f"{spec} is not a tokenizer.json: {error}") from error
    tokenizer.add_special_tokens(["[DEC]", "[ENC]"])
    if tokenizer.get_vocab_size() != count:
        raise UserError(
            f"{spec} has {tokenizer.get_vocab_size() - 2} words where ImageReward's has {count - 2}"
        )
    tokenizer.enable_truncation(MAX_TOKENS)
    tokenizer.enable_padding(length=MAX_TOKENS)
    return tokenizer


def make_vision_config(sizes: RewardSizes) -> BlipVisionConfig:
    """Return the config of the image encoder."""
    return BlipVisionConfig(
        image_size=sizes.pixels,
        patch_size=16,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        layer_norm_eps=1e-6,
    )


def make_text_config(sizes: RewardSizes) -> BlipTextConfig:
    """Return the config of the text encoder."""
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


def rename_reward_weights(published: Any) -> dict[str, Tensor]:
    """Give the published weights our names.

    Weights that do not contribute to the reward are left out: BLIP's projections, and the position
    ids that transformers once stored.
    """
    state = published if isinstance(published, Mapping) else {}
    renamed = {}
    for published_name, value in state.items():
        name = rename_parameter(published_name)
        if name and not published_name.endswith(".position_ids"):
            renamed[name] = value
    return renamed


def rename_parameter(published: Any) -> str | None:
    """Return our name of a published weight, or None if the reward does not depend on it."""
    if not isinstance(published, str):
        return None
    for prefix, part in PREFIXES.items():
        if published.startswith(prefix):
            name = published.removeprefix(prefix)
            if part == "vision.":
                name = re.sub("|".join(VISION_NAMES), translate_vision_name, name)
            return part + name
    return None


def translate_vision_name(match: re.Match[str]) -> str:
    """Return transformers' name of the part whose name in timm was matched."""
    return VISION_NAMES[match[0]]
