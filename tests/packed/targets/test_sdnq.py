"""SDNQ's own package gets the same weights from what is stored for it."""

import os
from collections import Counter
from typing import Any

import pytest
import torch

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.packed.targets.sdnq import SDNQ, matches
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.layers import BF16, make_layers, store

os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # read when sdnq is imported
REASON = "sdnq (GPL-3.0) is not a requirement: make test-peers installs it"


def dequantize_by_sdnq(stored: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize as sdnq does after diffusers has cast floating-point tensors to `dtype`."""
    quantizer = pytest.importorskip("sdnq.quantizer", reason=REASON)
    layer_class = "Linear" if len(stored.shape) == 2 else "Conv2d"
    blank = torch.randn(stored.shape)
    dequantizer, theirs = quantizer.sdnq_quantize_layer_weight(
        blank, layer_class_name=layer_class, torch_dtype=dtype, **stored.settings
    )
    tensors = {}
    for name, value in stored.tensors.items():
        assert (value.shape, value.dtype) == (theirs[name].shape, theirs[name].dtype)
        is_cast = value.dtype in (torch.float32, torch.float8_e5m2)
        tensors[name] = value.to(dtype) if is_cast else value
        if name != "weight":
            tensors[name] = tensors[name].float()
    assert tensors.keys() == {name for name, value in theirs.items() if value is not None}
    return dequantizer(**tensors, skip_compile=True)


def test_random_layers_are_exact_or_refused():
    outcomes: Counter[str] = Counter()
    for layer, shape in make_layers(150):
        stored = store(SDNQ(), layer, shape)
        outcomes["refused" if stored is None else stored.settings["weights_dtype"]] += 1
        if stored is None:
            continue
        theirs = dequantize_by_sdnq(stored, layer.dtype)
        assert (theirs.dtype, theirs.shape) == (layer.dtype, shape)
        assert theirs.flatten(1).equal(layer.dequantize(layer.dtype))
        layout, buffers = pack_grid(SDNQ().decode(stored))
        back = layout.dequantize(buffers, layer.in_features, layout.build_lookup_table())
        assert back.to(layer.dtype).equal(layer.dequantize(layer.dtype))
    assert len(outcomes) > 10
    assert outcomes["refused"] < 100, outcomes


def make_layer(fmt, scale, group: int = 32, dtype=torch.float32) -> PackedLinear:
    granularity = PerGroup(group) if group else PerChannel()
    return make_packed_layer(Quantizer(fmt, granularity, scale), dtype)


@pytest.mark.parametrize(
    ("fmt", "scale", "dtype", "reason"),
    [
        (floating(2, 3), AbsMax(fp16), torch.float32, "values are e2m3: use weight.format of int4"),
        (floating(2, 1), AbsMax(fp16), torch.bfloat16, "casts them .* weight.scale.dtype=bf16"),
        (integer(4, signed=False), MinMax(), torch.float32, "are rounded.*weight.scale.dtype=fp16"),
        (integer(4), MinMax(fp16), torch.float32, "scales alone: use weight.scale.rule=absmax"),
    ],
)
def test_refusals_name_an_override(fmt, scale, dtype: torch.dtype, reason: str):
    with pytest.raises(UserError, match=reason):
        SDNQ().store(make_layer(fmt, scale, dtype=dtype), (24, 128), dtype)


def test_the_named_overrides_fit():
    assert SDNQ().store(
        make_layer(floating(2, 1), AbsMax(BF16), dtype=torch.bfloat16), (24, 128), torch.bfloat16
    )
    assert SDNQ().store(
        make_layer(integer(4, signed=False), MinMax(fp16)), (24, 128), torch.float32
    )


@pytest.mark.parametrize(
    "weights_dtype", ["int4", "int8", "fp4", "fp8", "float4_e3m0fn", "float8_e3m4fn"]
)
@pytest.mark.parametrize("group_size", [32, -1])
def test_layers_that_sdnq_quantized_are_read(weights_dtype: str, group_size: int):
    """Integers reach -8 and -128, which the symmetric formats of packed layers lack."""
    tensors, theirs = quantize_by_sdnq(weights_dtype, group_size)
    config = {"weights_dtype": weights_dtype, "group_size": group_size}
    read = SDNQ().read_settings("layer", config, tensors)
    assert read is not None
    layout, buffers = SDNQ().restore(StoredLayer((24, 128), tensors, read))
    assert layout.dequantize(buffers, 128, layout.build_lookup_table()).equal(theirs)


def test_zero_points_that_are_not_whole_are_refused():
    tensors, _ = quantize_by_sdnq("uint4", 32)
    with pytest.raises(UserError, match="zero points are not whole numbers"):
        SDNQ().restore(StoredLayer((24, 128), tensors, {"weights_dtype": "uint4"}))


def quantize_by_sdnq(weights_dtype: str, group_size: int) -> tuple[dict[str, Any], torch.Tensor]:
    """Return the tensors of a weight that sdnq quantized, and the weight that it dequantizes to."""
    quantizer = pytest.importorskip("sdnq.quantizer", reason=REASON)
    torch.manual_seed(0)
    dequantizer, tensors = quantizer.sdnq_quantize_layer_weight(
        torch.randn(24, 128),
        layer_class_name="Linear",
        weights_dtype=weights_dtype,
        group_size=group_size,
    )
    tensors = {name: value for name, value in tensors.items() if value is not None}
    return tensors, dequantizer(**tensors, skip_compile=True)


def test_patterns_mean_what_they_do_in_sdnq():
    utils = pytest.importorskip("sdnq.utils", reason=REASON)
    names = ["proj_out.weight", "blocks.0.attn.to_q.weight", "blocks.10.ff.net.2.weight"]
    patterns = ["proj_out", ".blocks.0", "blocks.1", "*to_q*", "blocks.*.ff", "net", "to_q.weight"]
    for name in names:
        for pattern in [*patterns, *names]:
            theirs = utils.check_param_name_in(name, [pattern]) is not None
            assert matches(name, pattern) == theirs, (name, pattern)
