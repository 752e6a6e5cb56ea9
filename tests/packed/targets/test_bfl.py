"""diffusers dequantizes what is stored as Black Forest Labs do to the same weights."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from diffusers.quantizers.bfl import utils

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.bfl import BFL, E4M3FN, name_format
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.layers import make_layers, store

NVFP4 = Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale())


def dequantize_by_diffusers(stored: StoredLayer) -> torch.Tensor:
    tensors = {name: value for name, value in stored.tensors.items() if name != "input_scale"}
    return getattr(utils, f"dequantize_{stored.settings['format']}")(**tensors)


def test_random_layers_are_exact_or_refused():
    outcomes: Counter[str] = Counter()
    for layer, shape in make_layers(200, [floating(2, 1), E4M3FN]):
        stored = store(BFL(), layer, shape)
        outcomes["refused" if stored is None else stored.settings["format"]] += 1
        if stored is None:
            continue
        weight = layer.dequantize(layer.dtype)
        assert dequantize_by_diffusers(stored).to(layer.dtype).equal(weight)
        layout, buffers = pack_grid(BFL().decode(stored))
        back = layout.dequantize(buffers, layer.in_features, layout.build_lookup_table())
        assert back.to(layer.dtype).equal(weight)
    assert outcomes["nvfp4"] > 0
    assert outcomes["fp8r"] > 0


@pytest.mark.parametrize("candidates", [(1.0,), (1.0, 1.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nvfp4_is_always_exact(candidates: tuple[float, ...], dtype: torch.dtype):
    for seed in range(10):
        quantizer = replace(NVFP4, scale=NVFP4Scale(256.0, candidates))
        layer = make_packed_layer(quantizer, dtype, seed=seed)
        stored = BFL().store(layer, (24, 128), dtype)
        assert dequantize_by_diffusers(stored).to(dtype).equal(layer.dequantize(dtype))


@pytest.mark.parametrize("quantize", [utils.quantize_nvfp4, utils.quantize_fp8r])
def test_layers_that_diffusers_quantized_are_read(quantize):
    names = ("weight", "weight_scale", "weight_scale_2")
    tensors = dict(zip(names, quantize(torch.randn(24, 128)), strict=False))
    stored = StoredLayer((24, 128), tensors, {"format": name_format(tensors)})
    layout, buffers = BFL().restore(stored)
    ours = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert ours.equal(dequantize_by_diffusers(stored))


@pytest.mark.parametrize(
    ("quantizer", "reason"),
    [
        (replace(NVFP4, scale=AbsMax(fp16)), "E4M3 times one .* use weight.scale.rule=nvfp4"),
        (replace(NVFP4, granularity=PerGroup(32)), "use weight.granularity.size=16"),
        (Quantizer(floating(3, 0), PerChannel(), AbsMax()), "use weight.format=e2m1"),
        (Quantizer(E4M3FN, PerGroup(32), E8M0Scale()), "32 values share a scale, and not 128"),
    ],
)
def test_refusals_name_an_override(quantizer: Quantizer, reason: str):
    with pytest.raises(UserError, match=reason):
        BFL().store(make_packed_layer(quantizer), (24, 128), torch.float32)
