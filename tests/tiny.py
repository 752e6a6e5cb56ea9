"""Models of 2 to 6 blocks of width 32, or WIDTH, with random weights, in diffusers' layout: all of the structure and no
wait."""

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

from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.models.shapes.build import scheduler, tokenizer
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.resume import Trainers
from fp4dit.scales import AbsMax, MinMax
from fp4dit.tasks.reconstruct import Learnt, Relative
from pipelines.runtime import Runtime

WIDTH = 32
PROMPTS = ["a large red circle on a white background", "a small blue square", "a large green star", "a red square"]
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


def autoencoder(halvings: int = 1, attention: bool = True, shift: float | None = None) -> AutoencoderKL:
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
    words, vae = tokenizer(), autoencoder()
    PixArtSigmaPipeline(words, text_encoder(len(words)), vae, transformer(), scheduler()).save_pretrained(folder)


def save_alpha(folder: Path) -> None:
    """With the size conditions that the 1024 px model has: diffusers passes them where `sample_size` is 128."""
    torch.manual_seed(0)
    changed = {"sample_size": 128, "patch_size": 16, "use_additional_conditions": True}
    width = 3 * WIDTH  # which three embeddings share
    changed |= {"attention_head_dim": width // 2, "cross_attention_dim": width}
    dit = PixArtTransformer2DModel.from_config(dict(transformer().config) | changed)
    words = tokenizer()
    PixArtAlphaPipeline(words, text_encoder(len(words)), autoencoder(halvings=0), dit, scheduler()).save_pretrained(
        folder
    )


def save_hunyuan(folder: Path, conditions: bool = True) -> None:
    """With size conditions and style, as 1.0 and 1.1, or without, as 1.2. Its pipeline takes 8 pixels for a latent."""
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
    words = tokenizer()
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
        num_attention_heads=2, attention_head_dim=WIDTH // 2, out_channels=8, num_layers=2, sample_size=8
    )
    DiTPipeline(dit, autoencoder(), DDIMScheduler()).save_pretrained(folder)
    index = folder / "model_index.json"
    named = json.loads(index.read_text()) | {"id2label": {"0": "tench, Tinca tinca", "1": "goldfish"}}
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
    """Stable Diffusion 3: blocks with two streams, of which the last answers with one."""
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
    words = tokenizer()
    encoders = (clip(len(words)), words, clip(len(words)), words, text_encoder(len(words), 2 * WIDTH), words)
    StableDiffusion3Pipeline(dit, FlowMatchEulerDiscreteScheduler(), autoencoder(shift=0.1), *encoders).save_pretrained(
        folder
    )


def save_flux(folder: Path) -> None:
    """Flux: two lists of blocks, the second over text and image as one sequence; rotary positions, no guided pair."""
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
    words = tokenizer()
    pooled = CLIPTextModel(clip(len(words)).config)
    scheduler = FlowMatchEulerDiscreteScheduler()
    FluxPipeline(
        scheduler, autoencoder(shift=0.1), pooled, words, text_encoder(len(words)), words, dit
    ).save_pretrained(folder)


def save_sana(folder: Path) -> None:
    """Sana: linear attention and depthwise convolutions, neither of which can be quantized."""
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
    words = tokenizer()
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
    SanaPipeline(words, Gemma2Model(text), vae, dit, FlowMatchEulerDiscreteScheduler()).save_pretrained(folder)


def rules(fmt: NumberFormat | None = None, affine: bool = False) -> list[Rule]:
    """4-bit weights in groups of 32, and one scale per row where 32 does not divide."""
    fmt = fmt or (integer(4, signed=False) if affine else floating(2, 1))
    scale = (MinMax if affine else AbsMax)(fp16)
    return [
        Rule("pos_embed.proj", Quantizer(fmt, Granularity("row"), scale)),
        Rule("*", Quantizer(fmt, Granularity("group", 32), scale)),
    ]


def trainer(label: str = "") -> Trainers:
    return Trainers(partial(Runtime({"accelerator": "cpu", "devices": 1}, "none").trainer, label))


def learnt(learner: Any, steps: int = 30, lr: float = 1e-2, **other: Any) -> Learnt:
    return Learnt(learner, partial(torch.optim.Adam, lr=lr), other.pop("objective", Relative()), steps, 8, **other)


def one_by_one(items: Iterable[Any]) -> DataLoader:
    return DataLoader(list(items), batch_size=None, collate_fn=lambda item: item)


def count(module: nn.Module) -> list[int]:
    """Grows by the rows of every call of `module`, copies of it included."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    return calls
