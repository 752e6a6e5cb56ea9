"""Tiny models with random weights in the layout of diffusers.

They have 2 to 6 blocks of width WIDTH, and the structure of the published models.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.pretraining.architecture import build_scheduler, build_tokenizer
from fp4dit.quantization.rule_specs import weight_rules
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.rounding.objectives import RelativeMSE
from fp4dit.utils.resumable import ResumableTrainers
from fp4dit.worlds import ShapesWorld
from pipelines.runtime.trainer import Runtime

WIDTH = 32

PROMPTS = [
    "a large red circle on a white background",
    "a small blue square",
    "a large green star",
    "a red square",
]

CLASSES = ["tench", "7", "goldfish", "999"]


def transformer() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        use_additional_conditions=False,
    )


def text_encoder(words: int, width: int | None = None) -> T5EncoderModel:
    sizes = {"d_model": width or WIDTH, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 1}
    return T5EncoderModel(T5Config(vocab_size=words, **sizes, dropout_rate=0.0))


def autoencoder(
    halvings: int = 1, attention: bool = True, shift: float | None = None
) -> AutoencoderKL:
    levels = halvings + 1
    return AutoencoderKL(
        shift_factor=shift,
        mid_block_add_attention=attention,
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )


def save(folder: Path) -> None:
    torch.manual_seed(0)
    words, vae = build_tokenizer(ShapesWorld()), autoencoder()
    PixArtSigmaPipeline(
        words, text_encoder(len(words)), vae, transformer(), build_scheduler()
    ).save_pretrained(folder)


def save_alpha(folder: Path) -> None:
    """Save a PixArt-alpha with the size conditions of the 1024 px model.

    diffusers passes these conditions if `sample_size` is 128.
    """
    torch.manual_seed(0)
    changed = {"sample_size": 128, "patch_size": 16, "use_additional_conditions": True}
    width = 3 * WIDTH  # which three embeddings share
    changed |= {"attention_head_dim": width // 2, "cross_attention_dim": width}
    dit = PixArtTransformer2DModel.from_config(dict(transformer().config) | changed)
    words = build_tokenizer(ShapesWorld())
    PixArtAlphaPipeline(
        words, text_encoder(len(words)), autoencoder(halvings=0), dit, build_scheduler()
    ).save_pretrained(folder)


def save_hunyuan(folder: Path, conditions: bool = True) -> None:
    """Save a HunyuanDiT with size and style conditions (1.0, 1.1), or without (1.2).

    Its pipeline assumes 8 pixels for each latent.
    """
    torch.manual_seed(0)
    dit = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=WIDTH,
        num_layers=6,
        cross_attention_dim=WIDTH,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=WIDTH,
        use_style_cond_and_image_meta_size=conditions,
    )
    words = build_tokenizer(ShapesWorld())
    clip = BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=WIDTH,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=77,
        )
    )
    HunyuanDiTPipeline(
        autoencoder(halvings=3),
        clip,
        words,
        dit,
        DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=text_encoder(len(words)),
        tokenizer_2=words,
    ).save_pretrained(folder)


def save_dit(folder: Path) -> None:
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        out_channels=8,
        num_layers=2,
        sample_size=8,
    )
    DiTPipeline(dit, autoencoder(), DDIMScheduler()).save_pretrained(folder)
    index = folder / "model_index.json"
    named = json.loads(index.read_text()) | {
        "id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}
    }
    index.write_text(json.dumps(named))


def clip(words: int) -> CLIPTextModelWithProjection:
    sizes = {
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "projection_dim": WIDTH,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = CLIPTextConfig(vocab_size=words, num_hidden_layers=2, num_attention_heads=2, **sizes)
    return CLIPTextModelWithProjection(config)


def save_sd3(folder: Path) -> None:
    """Save a Stable Diffusion 3: blocks have two streams, and the last one returns only one."""
    torch.manual_seed(0)
    dit = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
        pos_embed_max_size=8,
    )
    words = build_tokenizer(ShapesWorld())
    encoders = (
        clip(len(words)),
        words,
        clip(len(words)),
        words,
        text_encoder(len(words), 2 * WIDTH),
        words,
    )
    StableDiffusion3Pipeline(
        dit, FlowMatchEulerDiscreteScheduler(), autoencoder(shift=0.1), *encoders
    ).save_pretrained(folder)


def save_flux(folder: Path) -> None:
    """Save a Flux: rotary positions, no guided pair, and two lists of blocks.

    The blocks of the second list see text and image as one sequence.
    """
    torch.manual_seed(0)
    dit = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=WIDTH // 2,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(WIDTH // 8, 3 * WIDTH // 16, 3 * WIDTH // 16),
    )
    words = build_tokenizer(ShapesWorld())
    pooled = CLIPTextModel(clip(len(words)).config)
    scheduler = FlowMatchEulerDiscreteScheduler()
    FluxPipeline(
        scheduler, autoencoder(shift=0.1), pooled, words, text_encoder(len(words)), words, dit
    ).save_pretrained(folder)


def save_sana(folder: Path) -> None:
    """Save a Sana: its linear attention and depthwise convolutions cannot be quantized."""
    torch.manual_seed(0)
    dit = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        sample_size=8,
        mlp_ratio=2.0,
    )
    words = build_tokenizer(ShapesWorld())
    text = Gemma2Config(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    SanaPipeline(
        words, Gemma2Model(text), vae, dit, FlowMatchEulerDiscreteScheduler()
    ).save_pretrained(folder)


def rules(fmt: NumberFormat | None = None, affine: bool = False) -> list[Rule]:
    """Return rules for 4-bit weights in groups of 32, or per channel if 32 does not divide."""
    fmt = fmt or (integer(4, signed=False) if affine else floating(2, 1))
    scale = (MinMax if affine else AbsMax)(fp16)
    return [
        Rule("pos_embed.proj", Quantizer(fmt, PerChannel(), scale)),
        Rule("*", Quantizer(fmt, PerGroup(32), scale)),
    ]


def rules_for(quantizer: Quantizer, **options: Any) -> list[Rule]:
    """Return the weight rules of one quantizer, with the exceptions in `options`."""
    return weight_rules(quantizer.format, quantizer.granularity, quantizer.scale, **options)


def trainer(label: str = "") -> ResumableTrainers:
    return ResumableTrainers(
        partial(Runtime({"accelerator": "cpu", "devices": 1}, "none").make_trainer, label)
    )


def learned_rounding(
    learner: Any, steps: int = 30, lr: float = 1e-2, **options: Any
) -> LearnedRounding:
    """Return a rounding method of few steps in batches of 8."""
    return LearnedRounding(
        learner,
        partial(torch.optim.Adam, lr=lr),
        options.pop("objective", RelativeMSE()),
        steps,
        8,
        **options,
    )


def load_one_by_one(items: Iterable[Any]) -> DataLoader:
    return DataLoader(list(items), batch_size=None, collate_fn=lambda item: item)


def count(module: nn.Module) -> list[int]:
    """Return a list to which every call of `module`, or of a copy, appends its number of rows."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    return calls
