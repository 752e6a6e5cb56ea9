"""torchao builds its tensors from what is stored for it, and gets the same weights and inputs."""

import json
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.bfl import E4M3FN
from fp4dit.packed.targets.blocked_scales import swizzle, unswizzle
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.packed.targets.torchao import TorchAO
from fp4dit.packed.targets.torchao_inputs import MODES
from fp4dit.packed.targets.torchao_tensors import WEIGHT_CONFIGS
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.layers import UNSIGNED, make_layers, store

support: Any = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")

FORMATS = [floating(2, 1), E4M3FN, integer(4), integer(8), floating(3, 0), *UNSIGNED]

MXFP8 = Quantizer(E4M3FN, PerGroup(32), E8M0Scale())
MXFP4 = Quantizer(floating(2, 1), PerGroup(32), E8M0Scale())


def build_tensor(stored: StoredLayer) -> Any:
    """Return the tensor that torchao makes of a layer."""
    settings = {key: stored.settings[key] for key in ("_type", "_data", "_tensor_data_names")}
    metadata = {"layer.weight": json.dumps(settings), "tensor_names": '["layer.weight"]'}
    tensors = {f"layer.{name}": value for name, value in stored.tensors.items()}
    built, rest = support.unflatten_tensor_state_dict(tensors, metadata)
    assert not rest
    return built["layer.weight"]


def read(tensor: torch.Tensor) -> StoredLayer:
    """Return a tensor of torchao as a layer that is read."""
    flat, metadata = support.flatten_tensor_state_dict({"layer.weight": tensor})
    tensors = {name.removeprefix("layer."): value for name, value in flat.items()}
    config = {"fp4dit_metadata": metadata}
    settings = TorchAO().read_settings("layer", config, tensors)
    assert settings is not None
    return StoredLayer(tuple(tensor.shape), tensors, settings)


def unpack(stored: StoredLayer) -> torch.Tensor:
    layout, buffers = pack_grid(TorchAO().decode(stored))
    return layout.dequantize(buffers, stored.shape[1], layout.build_lookup_table())


def test_random_layers_are_exact_or_refused():
    outcomes: Counter[str] = Counter()
    for layer, shape in make_layers(600, FORMATS):
        stored = store(TorchAO(), layer, shape)
        outcomes["refused" if stored is None else stored.settings["_type"]] += 1
        if stored is None:
            continue
        theirs = build_tensor(stored)
        assert (theirs.dtype, theirs.shape) == (layer.dtype, shape)
        weight = layer.dequantize(layer.dtype)
        assert theirs.dequantize().equal(weight)
        assert unpack(stored).to(layer.dtype).equal(weight)
    assert outcomes.keys() == {"refused", *WEIGHT_CONFIGS}, outcomes


def make_mx(weight: Quantizer, inputs: Quantizer | None) -> PackedLinear:
    layer = make_packed_layer(weight, torch.bfloat16)
    if inputs is not None:
        layer.input_fake_quant = FakeQuantize(inputs)
    return layer


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("inputs", [MXFP8, MXFP4])
@pytest.mark.parametrize("weight", [MXFP8, MXFP4])
def test_inputs_of_mx_layers_are_quantized_as_here(weight: Quantizer, inputs: Quantizer, mode: str):
    layer = make_mx(weight, replace(inputs, scale=MODES[mode]))
    stored = TorchAO().store(layer, (24, 128), torch.bfloat16)
    assert TorchAO().stores_input(stored)
    x = (torch.randn(6, 128) * torch.randn(6, 1).exp()).bfloat16()
    expected = F.linear(layer.input_fake_quant(x), layer.dequantize(torch.bfloat16))
    assert F.linear(x, build_tensor(stored)).equal(expected)


@pytest.mark.parametrize("inputs", [None, Quantizer(integer(8), PerToken(), AbsMax())])
def test_other_inputs_of_mx_layers_are_not_claimed(inputs: Quantizer | None):
    stored = TorchAO().store(make_mx(MXFP4, inputs), (24, 128), torch.bfloat16)
    assert not TorchAO().stores_input(stored)
    assert TorchAO().quantizes_input(stored)


def quantize(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    from torchao.quantization import quantize_

    layer = nn.Sequential(nn.Linear(128, 32, bias=False, dtype=dtype))
    quantize_(layer, config)
    return layer[0].weight.data


def test_tensors_that_torchao_quantized_are_read():
    from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
    )

    configs = [
        NVFP4WeightOnlyConfig(),  # its scales are in the order of the tensor cores
        Float8WeightOnlyConfig(),
        Int8WeightOnlyConfig(version=2),
        IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
    ]
    for config in configs:
        tensor = quantize(config)
        assert unpack(read(tensor)).bfloat16().equal(tensor.dequantize()), config


def test_tensors_that_quantize_inputs_are_refused():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    with pytest.raises(UserError, match=r"act_quant_kwargs=.* has no counterpart here"):
        read(quantize(Int8DynamicActivationInt8WeightConfig(version=2)))


@pytest.mark.parametrize("shape", [(24, 8), (128, 4), (300, 10)])
def test_scales_are_swizzled_as_by_torchao(shape: tuple[int, int]):
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scales = torch.randint(1, 100, shape, dtype=torch.uint8)
    assert swizzle(scales).flatten().equal(utils.to_blocked(scales).flatten())
    assert unswizzle(swizzle(scales), shape).equal(scales)


@pytest.mark.parametrize(
    ("quantizer", "dtype", "reason"),
    [
        (Quantizer(floating(2, 1), PerGroup(16), AbsMax(fp16)), torch.float32, "rule=nvfp4"),
        (Quantizer(floating(2, 1), PerGroup(64), NVFP4Scale()), torch.float32, "size=16"),
        (Quantizer(integer(4), PerGroup(32), AbsMax(fp16)), torch.bfloat16, "dtype=bf16"),
        (Quantizer(floating(3, 0), PerChannel(), AbsMax()), torch.float32, "use weight.format of"),
    ],
)
def test_refusals_name_an_override(quantizer: Quantizer, dtype: torch.dtype, reason: str):
    with pytest.raises(UserError, match=reason):
        TorchAO().store(make_packed_layer(quantizer, dtype), (24, 128), dtype)
