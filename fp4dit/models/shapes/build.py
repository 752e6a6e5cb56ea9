"""The untrained parts of the shipped model, each in its library's own class and layout."""

from typing import Any

import open_clip
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from fp4dit.models.shapes.world import BACKGROUNDS, COLOURS, RADII, RELATIONS, SHAPES, SIZE

TOKENS = 20  # the longest caption has 16 words and an end mark
WIDTH = 256  # of the transformer and the text encoder: two weight groups of 128


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word. The end mark has the highest id, for that is where open_clip's text tower reads."""
    phrases = [*RADII, *COLOURS, *SHAPES, *RELATIONS, *BACKGROUNDS, "a on background"]
    words = list(dict.fromkeys(" ".join(phrases).split()))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *words, "</s>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=TOKENS
    )


def text_encoder(vocabulary: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=vocabulary, d_model=WIDTH, d_kv=64, num_heads=4, d_ff=512, num_layers=3, dropout_rate=0.0
    )
    model = T5EncoderModel(config)
    # Heads that already look at different distances: from T5's own, even start they take thousands of steps to.
    attention = model.encoder.block[0].layer[0].SelfAttention  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    nn.init.normal_(attention.relative_attention_bias.weight, std=2.0)
    return model


def autoencoder() -> AutoencoderKL:
    """64 x 64 pixels to 4 x 16 x 16 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),  # pyright: ignore[reportArgumentType]
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType]
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=SIZE,
    )


def transformer(layers: int = 6) -> PixArtTransformer2DModel:
    """PixArt as published, at width 256 and 64 tokens."""
    return PixArtTransformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        num_layers=layers,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )


def scheduler() -> DPMSolverMultistepScheduler:
    """PixArt's noise schedule and sampler. Unlike PixArt the model predicts v, which is learnt in fewer steps."""
    return DPMSolverMultistepScheduler(prediction_type="v_prediction")


def clip_config(vocabulary: int) -> dict[str, Any]:
    """In open_clip's own form; its tokenizer is ours."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": SIZE, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
        "text_cfg": {
            "context_length": TOKENS,
            "vocab_size": vocabulary,
            "hf_tokenizer_name": "shapes",
            "width": 128,
            "heads": 4,
            "layers": 3,
            "no_causal_mask": True,
        },
    }


def clip(vocabulary: int) -> open_clip.CLIP:
    return open_clip.CLIP(**clip_config(vocabulary))
