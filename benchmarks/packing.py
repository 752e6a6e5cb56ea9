"""Quantize, pack, save and load the transformers that benchmarks compare."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat, floating, integer
from fp4dit.packed.export import pack_transformer_
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.rule_specs import activation_rules, weight_rules
from fp4dit.quantization.rules import Rule, assign_rules, find_layers

ATTENTION = ["*.attn?.[qkv]"]


@dataclass(frozen=True)
class RulePair:
    """Rules of weights and of activations."""

    weight: Sequence[Rule]
    activation: Sequence[Rule]


def make_group_rules(**layers: Mapping[str, str]) -> list[Rule]:
    """Return the rules of E2M1 weights in groups of 128."""
    scale = {"rule": "absmax", "dtype": "fp16"}
    group = {"per": "group", "size": 128}
    return weight_rules("e2m1", group, scale, ["pos_embed.proj"], layers)


def make_token_rules(fmt: NumberFormat, leave: Sequence[str] = ()) -> list[Rule]:
    """Return the rules of activations with one dynamic scale for each token."""
    return activation_rules(fmt, "token", ignore=leave)


# The operands of attention stay in 16 bits, as torchao leaves them.
W4A8 = RulePair(make_group_rules(), make_token_rules(E4M3, ATTENTION))
W4A6 = RulePair(make_group_rules(), make_token_rules(floating(2, 3), ATTENTION))
W4A16 = RulePair(make_group_rules(), [])
# For weights that are expanded once: a product for each group of 128 would be slow.
W4A6_ROWS = RulePair(
    weight_rules("e2m1", "channel", {"rule": "absmax", "dtype": "fp16"}, ["pos_embed.proj"]),
    make_token_rules(floating(2, 3), ATTENTION),
)
PRE_GELU = {"match": "*.ff.net.0.proj", "format": "e3m0"}
# Equal to method=rtn_fp4.
RTN_FP4 = RulePair(make_group_rules(pre_gelu=PRE_GELU), make_token_rules(floating(3, 4)))
RTN_FP4_A6 = RulePair(make_group_rules(pre_gelu=PRE_GELU), make_token_rules(floating(2, 3)))
W8A8 = RulePair(
    weight_rules("int8", "channel", "absmax", ["pos_embed.proj"]), make_token_rules(integer(8))
)
BLOCKS_OF_16 = {"per": "group", "size": 16}
FOUR_OVER_SIX = {"rule": "nvfp4", "top": 256.0, "candidates": [1.0, 1.5]}
NVFP4_W4A4 = RulePair(
    weight_rules("e2m1", BLOCKS_OF_16, FOUR_OVER_SIX),
    activation_rules("e2m1", BLOCKS_OF_16, FOUR_OVER_SIX),
)
NVFP4_W4A16 = RulePair(NVFP4_W4A4.weight, [])


def quantize_to_nearest_(
    dit: nn.Module, rules: RulePair
) -> tuple[Mapping[str, Rule], Mapping[str, Rule]]:
    """Quantize a transformer to nearest, in place.

    Returns:
        The rules by layer, and the rules by activation.
    """
    weight = assign_rules(find_layers(dit), rules.weight)
    for layer in quantize_weights_(dit, weight).values():
        layer.prepare().commit_weight()
    _, activation = quantize_activations_(dit, rules.activation)
    return weight, activation


def save_packed(dit: ModelMixin, rules: RulePair, folder: Path) -> None:
    """Quantize and pack a transformer in place, and save it."""
    pack_transformer_(dit, *quantize_to_nearest_(dit, rules))
    dit.save_pretrained(folder)


def load_transformer(kind: type[ModelMixin], folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a transformer of a class from a folder, for inference."""
    model = kind.from_pretrained(folder, torch_dtype=dtype)
    return model.eval().requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]
