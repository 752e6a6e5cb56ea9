"""Tiny random pipelines of classes that nobody wrote a config for: `model=generic`, untouched.

They were chosen as different from the families of `tests.helpers.tiny_families`: blocks that
alternate between space and time, a language model of the GLM kind, and streams of text and video
of different widths.
"""

import diffusers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from tests.helpers.tiny import WIDTH, autoencoder, text_encoder
from tests.helpers.tiny_families import (
    BLOCKS,
    HEAD_DIM,
    HEADS,
    SMALL,
    VIDEO,
    language_model,
    make_family,
    tokenizer,
)


def latte() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.LatteTransformer3DModel(
        **BLOCKS,
        sample_size=4,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        caption_channels=WIDTH,
        cross_attention_dim=WIDTH,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=4,
    )
    return diffusers.LattePipeline(
        words, text_encoder(len(words)), autoencoder(), transformer, diffusers.DDIMScheduler()
    )


def cogview4() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.CogView4Transformer2DModel(
        **BLOCKS,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        condition_dim=WIDTH // 2,
    )
    return diffusers.CogView4Pipeline(
        words,
        language_model("GlmModel", words),
        autoencoder(halvings=3),
        transformer,
        FlowMatchEulerDiscreteScheduler(),
    )


def mochi() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.MochiTransformer3DModel(
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        patch_size=2,
        pooled_projection_dim=WIDTH // 2,
        in_channels=12,  # as many as the pipeline assumes
        text_embed_dim=WIDTH,
        time_embed_dim=WIDTH,
        max_sequence_length=16,
    )
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[0.0] * 12,
        latents_std=[1.0] * 12,
    )
    return diffusers.MochiPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, text_encoder(len(words)), words, transformer
    )


STRANGERS = {
    "latte": make_family(
        latte,
        {"height": 16, "width": 16, "video_length": 4, "clean_caption": False},
        "transformer_blocks.*.ff.net.0.proj",
        "temporal_transformer_blocks.*.ff.net.0.proj",
    ),
    "cogview4": make_family(
        cogview4, {**SMALL, "max_sequence_length": 32}, "transformer_blocks.*.ff.net.0.proj"
    ),
    "mochi": make_family(
        mochi,
        {**VIDEO, "num_frames": 7},
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff_context.net.0.proj",
    ),
}
