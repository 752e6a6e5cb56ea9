"""Tiny random pipelines of the families that people quantize today, for `model=generic`.

Each has the structure of the published model: the same classes of diffusers, with one or two blocks
of width WIDTH and with text encoders and autoencoders of a few channels.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import nn
from transformers import PreTrainedTokenizerFast

from fp4dit.pretraining.architecture import build_tokenizer
from fp4dit.worlds import ShapesWorld
from tests.helpers.tiny import (
    WIDTH,
    autoencoder,
    clip,
    save_flux,
    save_sana,
    save_sd3,
    text_encoder,
)

HEADS, HEAD_DIM = 2, WIDTH // 2
ROPE_AXES = (HEAD_DIM // 4, HEAD_DIM // 4, HEAD_DIM // 2)
BLOCKS = {"num_layers": 2, "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

LANGUAGE_MODEL = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def tokenizer(tokens: int | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the shapes' words, which also has a chat template."""
    words = build_tokenizer(ShapesWorld())
    words.chat_template = CHAT_TEMPLATE
    if tokens:
        words.model_max_length = tokens
    return words


def language_model(kind: str, words: Any, **changed: Any) -> nn.Module:
    """Return a tiny language model of transformers, such as a `Qwen3Model`."""
    config = getattr(
        transformers, kind.removesuffix("Model").removesuffix("ForCausalLM") + "Config"
    )
    return getattr(transformers, kind)(
        config(vocab_size=len(words), **{**LANGUAGE_MODEL, **changed}, pad_token_id=0)
    )


def flux2_klein() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.Flux2Transformer2DModel(
        **BLOCKS,
        num_single_layers=2,
        in_channels=16,
        joint_attention_dim=3 * WIDTH,
        timestep_guidance_channels=WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    return diffusers.Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae,
        language_model("Qwen3ForCausalLM", words),
        words,
        transformer,
    )


def z_image() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,),
        all_f_patch_size=(1,),
        in_channels=4,
        dim=48,  # whose 8 thirds are rows of the feed-forward layers
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=WIDTH,
        axes_dims=list(ROPE_AXES),
        axes_lens=[256, 32, 32],
    )
    # The published class leaves these two tokens without values.
    nn.init.normal_(transformer.x_pad_token)
    nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder(halvings=1, shift=0.1),
        language_model("Qwen3Model", words),
        words,
        transformer,
    )


def qwen_image() -> DiffusionPipeline:
    words = tokenizer(64)
    transformer = diffusers.QwenImageTransformer2DModel(
        **BLOCKS,
        in_channels=16,
        out_channels=4,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=ROPE_AXES,
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    text = {key: value for key, value in LANGUAGE_MODEL.items() if key != "head_dim"}
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **text,
            "vocab_size": len(words),
            "rope_scaling": rope,
            "rope_theta": 1000000.0,
        },
        vision_config=vision,
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return diffusers.QwenImagePipeline(
        FlowMatchEulerDiscreteScheduler(), vae, encoder, words, transformer
    )


def chroma() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.ChromaTransformer2DModel(
        **BLOCKS,
        in_channels=16,
        num_single_layers=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=ROPE_AXES,
        approximator_hidden_dim=WIDTH,
        approximator_layers=1,
        approximator_num_channels=64,
    )
    return diffusers.ChromaPipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder(shift=0.1),
        text_encoder(len(words)),
        words,
        transformer,
    )


def lumina2() -> DiffusionPipeline:
    words = tokenizer(77)
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=HEADS,
        num_kv_heads=HEADS,
        multiple_of=16,
        ffn_dim_multiplier=1.0,
        axes_dim_rope=(4, 4, 8),
        axes_lens=(300, 64, 64),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(),
        autoencoder(halvings=3, shift=0.1),
        language_model("Gemma2Model", words),
        words,
    )


def auraflow() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    )
    encoder = transformers.UMT5EncoderModel(umt5_config(len(words)))
    return diffusers.AuraFlowPipeline(
        words, encoder, autoencoder(), transformer, FlowMatchEulerDiscreteScheduler()
    )


def umt5_config(words: int) -> transformers.UMT5Config:
    return transformers.UMT5Config(
        vocab_size=words,
        d_model=WIDTH,
        d_kv=16,
        num_heads=2,
        d_ff=64,
        num_layers=1,
        dropout_rate=0.0,
    )


def hidream() -> DiffusionPipeline:
    words = tokenizer(77)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        **BLOCKS,
        patch_size=16,
        in_channels=4,
        out_channels=4,
        num_single_layers=2,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=2 * WIDTH,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=ROPE_AXES,
        max_resolution=(128, 128),
        llama_layers=[0, 1, 2, 2],
    )
    return diffusers.HiDreamImagePipeline(
        FlowMatchEulerDiscreteScheduler(),
        autoencoder(halvings=0, shift=0.1),
        clip(len(words)),
        words,
        clip(len(words)),
        words,
        text_encoder(len(words)),
        words,
        language_model("LlamaForCausalLM", words, attn_implementation="eager"),
        words,
        transformer,
    )


def wan_transformer() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        rope_max_seq_len=32,
    )


def wan(experts: int = 1) -> DiffusionPipeline:
    """Return a Wan 2.1, or a Wan 2.2 if it has two experts."""
    words = tokenizer()
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return diffusers.WanPipeline(
        tokenizer=words,
        text_encoder=transformers.UMT5EncoderModel(umt5_config(len(words))),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer() if experts == 2 else None,
        boundary_ratio=0.95 if experts == 2 else None,
    )


def wan_2_2() -> DiffusionPipeline:
    return wan(experts=2)


def ltx() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.LTXVideoTransformer3DModel(
        **BLOCKS,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        upsample_residual=(False, False, False, False),
        upsample_factor=(1, 1, 1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    vae.use_framewise_encoding = False
    vae.use_framewise_decoding = False
    return diffusers.LTXPipeline(
        FlowMatchEulerDiscreteScheduler(), vae, text_encoder(len(words)), words, transformer
    )


def cogvideox() -> DiffusionPipeline:
    words = tokenizer()
    transformer = diffusers.CogVideoXTransformer3DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        time_embed_dim=WIDTH,
        text_embed_dim=WIDTH,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return diffusers.CogVideoXPipeline(
        words, text_encoder(len(words)), vae, transformer, diffusers.DDIMScheduler()
    )


def hunyuan_video() -> DiffusionPipeline:
    words = tokenizer(77)
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        **BLOCKS,
        in_channels=4,
        out_channels=4,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=ROPE_AXES,
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        act_fn="silu",
        mid_block_add_attention=True,
    )
    pooled = transformers.CLIPTextModel(clip(len(words)).config)
    return diffusers.HunyuanVideoPipeline(
        language_model("LlamaModel", words),
        words,
        transformer,
        vae,
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        pooled,
        words,
    )


@dataclass(frozen=True)
class TinyFamily:
    """Tiny replica of a family.

    Args:
        save: Saves the pipeline with fixed random weights in a folder.
        options: Arguments of the pipeline for small images or videos.
        pre_activation: The patterns of the layers before activation functions, by the source of
            diffusers.
        overrides: Overrides that the family needs.
    """

    save: Callable[[Path], None]
    options: Mapping[str, Any]
    pre_activation: Sequence[str]
    overrides: Sequence[str] = ()

    @property
    def arguments(self) -> list[str]:
        """The overrides of a run, without the path of the model."""
        options = []
        for name, value in self.options.items():
            options.append(f"+model.options.{name}={format_value(value)}")
        return ["model=generic", "model.dtype=float32", *options, *self.overrides]


def format_value(value: Any) -> str:
    """Return a value in the grammar of overrides."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{format_value(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def make_family(
    build: Callable[[], DiffusionPipeline], options: Mapping[str, Any], *pre_activation: str
) -> TinyFamily:
    """Make a family whose pipeline `build` returns."""

    def save(folder: Path) -> None:
        torch.manual_seed(0)
        build().save_pretrained(folder)

    return TinyFamily(save, options, pre_activation)


SMALL = {"height": 32, "width": 32}
SHORT = {**SMALL, "max_sequence_length": 16}
VIDEO = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
BLOCK_MLP = "transformer_blocks.*.ff.net.0.proj"
CONTEXT_MLP = "transformer_blocks.*.ff_context.net.0.proj"
SINGLE_MLP = "single_transformer_blocks.*.proj_mlp"
REFINERS = ("noise_refiner", "context_refiner", "layers")

TINY_FAMILIES = {
    "flux": TinyFamily(
        save_flux,
        SHORT,
        (BLOCK_MLP, CONTEXT_MLP, SINGLE_MLP),
    ),
    "flux2_klein": make_family(
        flux2_klein,
        {**SHORT, "text_encoder_out_layers": [1, 2, 3]},
        "transformer_blocks.*.ff.linear_in",
        "transformer_blocks.*.ff_context.linear_in",
        "single_transformer_blocks.*.attn.to_qkv_mlp_proj",
    ),
    "z_image": make_family(z_image, SHORT, *(f"{part}.*.feed_forward.w1" for part in REFINERS)),
    "qwen_image": make_family(
        qwen_image,
        SMALL,
        "transformer_blocks.*.img_mlp.net.0.proj",
        "transformer_blocks.*.txt_mlp.net.0.proj",
    ),
    "sd3": TinyFamily(save_sd3, SMALL, (BLOCK_MLP, CONTEXT_MLP)),
    "wan": make_family(wan, VIDEO, "blocks.*.ffn.net.0.proj"),
    "wan_2_2": replace(
        make_family(wan_2_2, VIDEO, "blocks.*.ffn.net.0.proj"),
        overrides=["model.transformer=transformer"],
    ),
    "ltx": make_family(ltx, {**SHORT, "num_frames": 9}, BLOCK_MLP),
    "chroma": make_family(
        chroma,
        SHORT,
        "distilled_guidance_layer.layers.*.linear_1",
        BLOCK_MLP,
        CONTEXT_MLP,
        SINGLE_MLP,
    ),
    "lumina2": make_family(
        lumina2,
        {**SMALL, "max_sequence_length": 40},
        *(f"{part}.*.feed_forward.linear_1" for part in REFINERS),
    ),
    "sana": TinyFamily(
        save_sana,
        {
            **SMALL,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
            "clean_caption": False,
        },
        ("transformer_blocks.*.ff.conv_inverted",),
        # Its linear attention has no scaled dot product.
        ("+activation.ignore=['*.attn1.[qkv]']",),
    ),
    "hidream": make_family(
        hidream,
        {"height": 128, "width": 128, "max_sequence_length": 16},
        "double_stream_blocks.*.block.ff_i.shared_experts.w1",
        *(f"double_stream_blocks.*.block.ff_i.experts.{i}.w1" for i in range(4)),
        "double_stream_blocks.*.block.ff_t.w1",
        "single_stream_blocks.*.block.ff_i.shared_experts.w1",
        *(f"single_stream_blocks.*.block.ff_i.experts.{i}.w1" for i in range(4)),
    ),
    "cogvideox": make_family(cogvideox, {**VIDEO, "num_frames": 9}, BLOCK_MLP),
    "hunyuan_video": make_family(
        hunyuan_video,
        {**VIDEO, "prompt_template": {"template": "{}", "crop_start": 0}},
        "context_embedder.token_refiner.refiner_blocks.*.ff.net.0.proj",
        BLOCK_MLP,
        CONTEXT_MLP,
        SINGLE_MLP,
    ),
    "auraflow": make_family(
        auraflow,
        SHORT,
        "joint_transformer_blocks.*.ff.linear_1",
        "joint_transformer_blocks.*.ff_context.linear_1",
        "single_transformer_blocks.*.ff.linear_1",
    ),
}
