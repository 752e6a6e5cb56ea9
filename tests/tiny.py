"""A PixArt of 2 blocks of width 32 with random weights, in diffusers' layout: all of the structure and no wait."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import T5Config, T5EncoderModel

from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.models.shapes.build import scheduler, tokenizer
from fp4dit.policy import Rule
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax
from fp4dit.tasks.reconstruct import Learnt, Relative
from pipelines.runtime import Runtime

WIDTH = 32
PROMPTS = ["a large red circle on a white background", "a small blue square", "a large green star", "a red square"]


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


def save(folder: Path) -> None:
    torch.manual_seed(0)
    words = tokenizer()
    text = T5Config(vocab_size=len(words), d_model=WIDTH, d_kv=16, num_heads=2, d_ff=64, num_layers=1, dropout_rate=0.0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
    )
    parts = (words, T5EncoderModel(text), vae, transformer(), scheduler())
    PixArtSigmaPipeline(*parts).save_pretrained(folder)


def rules(fmt: NumberFormat | None = None, affine: bool = False) -> list[Rule]:
    """4-bit weights in groups of 32, and one scale per row where 32 does not divide."""
    fmt = fmt or (integer(4, signed=False) if affine else floating(2, 1))
    scale = (MinMax if affine else AbsMax)(fp16)
    return [
        Rule("pos_embed.proj", Quantizer(fmt, Granularity("row"), scale)),
        Rule("*", Quantizer(fmt, Granularity("group", 32), scale)),
    ]


def trainer(label: str = "") -> Callable[..., L.Trainer]:
    return partial(Runtime({"accelerator": "cpu", "devices": 1}, "none").trainer, label)


def learnt(learner: Any, steps: int = 30, lr: float = 1e-2, **other: Any) -> Learnt:
    return Learnt(learner, partial(torch.optim.Adam, lr=lr), other.pop("objective", Relative()), steps, 8, **other)


def one_by_one(items: Iterable[Any]) -> DataLoader:
    return DataLoader(list(items), batch_size=None, collate_fn=lambda item: item)


def count(module: nn.Module) -> list[int]:
    """Grows by the rows of every call of `module`, copies of it included."""
    calls: list[int] = []
    module.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    return calls
