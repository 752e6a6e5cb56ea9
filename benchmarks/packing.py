"""Transformers as they are compared: what is quantized how, simulated, packed, and read back from a folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from fp4dit import policy
from fp4dit.blockscales import E4M3
from fp4dit.formats import floating, fp16
from fp4dit.packed.export import pack_transformer_
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax

E2M1 = Quantizer(floating(2, 1), Granularity("group", 128), AbsMax(fp16))
BY_ROW = ["pos_embed.proj"]  # 16 inputs
ATTENTION = ["*.attn?.[qkv]"]


@dataclass(frozen=True)
class Rules:
    weight: Sequence[Rule]
    activation: Sequence[Rule]


def tokens(fmt: policy.Format, leave: Sequence[str] = ()) -> list[Rule]:
    """One scale a token, measured as it arrives."""
    return everywhere(Quantizer(fmt, Granularity("row")), leave=leave)


# What enters attention's own products stays in 16 bits, as torchao leaves it.
W4A8 = Rules(everywhere(E2M1, BY_ROW), tokens(E4M3, ATTENTION))
W4A6 = Rules(everywhere(E2M1, BY_ROW), tokens(floating(2, 3), ATTENTION))
# method=rtn_fp4
RTN_FP4 = Rules(everywhere(E2M1, BY_ROW, {"*.ff.net.0.proj": floating(3, 0)}), tokens(floating(3, 4)))


def simulate_(dit: nn.Module, rules: Rules) -> tuple[Mapping[str, Rule], Mapping[str, Rule]]:
    """Quantize to nearest, in place; the rules by layer and by activation."""
    weight = policy.assign(policy.layers(dit), rules.weight)
    for layer in policy.quantize_weights_(dit, weight).values():
        layer.prepare().freeze()
    _, activation = policy.quantize_activations_(dit, rules.activation)
    return weight, activation


def save_packed(dit: ModelMixin, rules: Rules, folder: Path) -> None:
    """The transformer is packed, in place."""
    pack_transformer_(dit, *simulate_(dit, rules))
    dit.save_pretrained(folder)


def read(kind: type[ModelMixin], folder: Path, dtype: torch.dtype) -> nn.Module:
    found = kind.from_pretrained(folder, torch_dtype=dtype)
    return found.eval().requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
