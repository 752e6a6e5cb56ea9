"""Packed layers and models with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fp4dit.numerics.quantizer import Quantizer
from fp4dit.packed.export import pack_transformer_
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, make_quant_layer
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.transforms.base import TransformSpec
from tests.helpers import tiny


def make_packed_layer(
    quantizer: Quantizer,
    dtype: torch.dtype = torch.float32,
    transforms: Sequence[TransformSpec] = (),
    source: nn.Module | None = None,
    seed: int = 0,
) -> PackedLinear:
    torch.manual_seed(seed)
    source = (source or nn.Linear(128, 24)).to(dtype)
    with torch.no_grad():
        source.weight.mul_(
            torch.randn(len(source.weight)).exp().view(-1, *[1] * (source.weight.ndim - 1))
        )
        source.weight[3] = 0
    quant_layer = make_quant_layer(source, quantizer, transforms)
    quant_layer.prepare(torch.randn(3, 4, 128) if transforms else None).commit_weight()
    return pack_layer(quant_layer)


def pack_model(
    weight: Sequence[Rule],
    activation: Sequence[Rule] = (),
    dtype: torch.dtype = torch.bfloat16,
    dit: Any = None,
) -> Any:
    torch.manual_seed(0)
    dit = (dit or tiny.transformer()).eval().to(dtype)
    rules, context = assign_rules(find_layers(dit), weight), TimestepContext()
    for layer in quantize_weights_(dit, rules, context=context).values():
        shape = (1, 8, layer.reduction_size)
        layer.prepare(torch.randn(shape) if layer.needs_calibration_inputs else None)
        layer.commit_weight()
    inputs = quantize_activations_(dit, activation)[1] if activation else {}
    pack_transformer_(dit, rules, inputs)
    return dit
