"""The untrained parts of a world's model, each in its library's own class and layout."""

from collections.abc import Sequence
from typing import Any

import open_clip
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fp4dit.worlds.base import World

WIDTH = 256  # channels of the transformer and the text encoder: two weight groups of 128
REDUCTION = 4  # pixels per latent, both ways


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word of the world.

    The end mark has the highest id, because that is where open_clip's text tower reads.
    """
    vocabulary: dict[str, int] = {}
    for token in ("<pad>", "<unk>", *world.vocabulary, "</s>"):
        vocabulary[token] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=world.tokens,
    )


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Return a T5 encoder of three layers for a vocabulary of this many tokens."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH,
        d_kv=64,
        num_heads=4,
        d_ff=512,
        num_layers=3,
        dropout_rate=0.0,
    )
    model = T5EncoderModel(config)
    # Heads start by looking at different distances. From T5's even start, they learn this only in
    # thousands of steps.
    attention = model.encoder.block[0].layer[0].SelfAttention  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    nn.init.normal_(attention.relative_attention_bias.weight, std=2.0)
    return model


def build_autoencoder(
    world: World, widths: Sequence[int] = (16, 32, 64), latents: int = 4, layers: int = 1
) -> AutoencoderKL:
    """Return an autoencoder.

    Args:
        world: The source of pictures.
        widths: Channels at full, half and quarter size.
        latents: Channels of the latents.
        layers: The number of layers per block.
    """
    levels = len(widths)
    return AutoencoderKL(
        block_out_channels=tuple(widths),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * levels,  # pyright: ignore[reportArgumentType]
        layers_per_block=layers,
        norm_num_groups=8,
        latent_channels=latents,
        sample_size=world.image_size,
    )


def build_transformer(world: World, layers: int = 6, latents: int = 4) -> PixArtTransformer2DModel:
    """Return PixArt as published, at width 256 and a token per 2 x 2 latents."""
    return PixArtTransformer2DModel(
        sample_size=world.image_size // REDUCTION,
        patch_size=2,
        num_layers=layers,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        in_channels=latents,
        out_channels=2 * latents,
        use_additional_conditions=False,
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return PixArt's noise schedule and sampler.

    Unlike PixArt the model predicts v, which it learns in fewer steps.
    """
    return DPMSolverMultistepScheduler(prediction_type="v_prediction")


def build_clip_config(world: World, vocabulary: int) -> dict[str, Any]:
    """Return the config of the small CLIP in open_clip's own form."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": world.image_size,
            "patch_size": 8,
            "width": 128,
            "head_width": 32,
            "layers": 4,
        },
        "text_cfg": {
            "context_length": world.tokens,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": world.name,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "no_causal_mask": True,
        },
    }


def build_clip(world: World, vocabulary: int) -> open_clip.CLIP:
    """Return the small CLIP for a vocabulary of this many tokens."""
    return open_clip.CLIP(**build_clip_config(world, vocabulary))
