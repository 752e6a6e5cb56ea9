"""comfy-kitchen's eager code dequantizes what is stored for ComfyUI to the same weights."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors import safe_open

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale, PowerOfTwoNVFP4Scale
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.bfl import E4M3FN
from fp4dit.packed.targets.comfyui import ComfyUI, read_marker
from fp4dit.packed.targets.conversion import import_folder
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard, RegularHadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.cases import COMFYUI, group
from tests.packed.targets.layers import make_layer_of_tiles, make_layers, store

REASON = "comfy-kitchen is not a requirement: make test-peers installs it"

CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def dequantize_by_kitchen(stored: StoredLayer, dtype: torch.dtype) -> torch.Tensor:
    kitchen: Any = pytest.importorskip("comfy_kitchen.backends.eager.quantization", reason=REASON)
    weight, scale = stored.tensors["weight"], stored.tensors["weight_scale"]
    fmt = stored.settings["format"]
    if fmt == "nvfp4":
        return kitchen.dequantize_nvfp4(weight, stored.tensors["weight_scale_2"], scale, dtype)
    if fmt == "mxfp8":
        return kitchen.dequantize_mxfp8(weight, scale, dtype)
    if fmt == "float8_e4m3fn":
        return kitchen.dequantize_per_tensor_fp8(weight, scale, dtype)
    return kitchen.dequantize_int8_simple(weight, scale).to(dtype)


def check(layer: PackedLinear, stored: StoredLayer) -> None:
    weight = layer.dequantize(layer.dtype)
    assert dequantize_by_kitchen(stored, layer.dtype).equal(weight)
    layout, buffers = pack_grid(ComfyUI().decode(stored))
    back = layout.dequantize(buffers, layer.in_features, layout.build_lookup_table())
    assert back.to(layer.dtype).equal(weight)


def test_random_layers_are_exact_or_refused():
    outcomes: Counter[str] = Counter()
    for layer, shape in make_layers(300, [floating(2, 1), E4M3FN, integer(8)]):
        stored = store(ComfyUI(), layer, shape)
        outcomes["refused" if stored is None else stored.settings["format"]] += 1
        if stored is not None:
            check(layer, stored)
    assert outcomes["int8_tensorwise"] > 5
    assert outcomes["float8_e4m3fn"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("quantizer", "fmt"),
    [
        (group(floating(2, 1), 16, PowerOfTwoNVFP4Scale()), "nvfp4"),
        (group(floating(2, 1), 16, PowerOfTwoNVFP4Scale(256.0, (1.0, 1.5))), "nvfp4"),
        (group(E4M3FN, 32, E8M0Scale()), "mxfp8"),
        (Quantizer(integer(8), PerChannel(), AbsMax()), "int8_tensorwise"),
    ],
)
def test_formats_are_exact_in_every_dtype(quantizer: Quantizer, fmt: str, dtype: torch.dtype):
    for seed in range(3):
        layer = make_layer_of_tiles(quantizer, (), dtype, seed)
        stored = ComfyUI().store(layer, (256, 128), dtype)
        assert stored.settings == {"format": fmt}
        check(layer, stored)


@pytest.mark.parametrize(
    ("quantizer", "dtype", "reason"),
    [
        (group(floating(2, 1), 16, NVFP4Scale()), torch.bfloat16, "nvfp4_power_of_two"),
        (group(floating(2, 1), 16), torch.bfloat16, "use weight.scale.rule=nvfp4"),
        (Quantizer(E4M3FN, PerChannel(), AbsMax()), torch.float32, "use weight.granularity=tensor"),
        (Quantizer(E4M3FN, PerTensor(), AbsMax()), torch.bfloat16, "use weight.scale.dtype=bf16"),
        (group(integer(4), 32), torch.float32, "use weight.format of e2m1"),
    ],
)
def test_refusals_name_an_override(quantizer: Quantizer, dtype: torch.dtype, reason: str):
    with pytest.raises(UserError, match=reason):
        ComfyUI().store(make_layer_of_tiles(quantizer, (), dtype), (256, 128), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("bits", "size"), [(4, 64), (4, 16), (8, 64)])
def test_rotated_integers_are_those_of_comfy_kitchen(bits: int, size: int, dtype: torch.dtype):
    """Its readers make the same weight of the tensors, rotated back to the channels."""
    quantizer = Quantizer(integer(bits), PerChannel(), AbsMax())
    layer = make_layer_of_tiles(quantizer, [RegularHadamard(size)], dtype)
    stored = ComfyUI().store(layer, (256, 128), dtype)
    marker = json.dumps(stored.settings).encode()
    assert read_marker("layer", torch.tensor(list(marker))) == stored.settings
    layout, buffers = ComfyUI().restore(stored)
    back = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert back.to(dtype).equal(layer.dequantize(dtype))
    ((spec, rotation),) = ComfyUI().restore_transforms(stored)
    assert spec == RegularHadamard(size)
    ours = rotation.transform_weight(layer.dequantize(torch.float32))  # its matrix is symmetric
    kitchen: Any = pytest.importorskip("comfy_kitchen.backends.eager", reason=REASON)
    weight, scale = stored.tensors["weight"], stored.tensors["weight_scale"]
    if bits == 4:
        theirs = kitchen.convrot_w4a4.dequantize_convrot_w4a4_weight(weight, scale, size)
        assert stored.settings == {"format": "convrot_w4a4", "convrot_groupsize": size}
    else:
        rows = weight.float() * scale
        h = kitchen.convrot_w4a4._build_hadamard(size)
        theirs = kitchen.convrot_w4a4._rotate_weight(rows, h, size)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("transforms", "quantizer", "reason"),
    [
        ([Hadamard(64)], Quantizer(integer(4), PerChannel()), "use transform=regular_hadamard"),
        ([LowRank(4)], Quantizer(integer(8), PerChannel()), "use transform=regular_hadamard"),
        ([RegularHadamard()], group(E4M3FN, 32, E8M0Scale()), "rotates int4 and int8"),
        ([RegularHadamard()], group(integer(4), 32), "32 values share a scale, and not 128"),
        ([], Quantizer(integer(4), PerChannel()), "use weight.format of e2m1"),
    ],
)
def test_other_rotated_layers_are_refused(
    transforms: list[TransformSpec], quantizer: Quantizer, reason: str
):
    layer = make_layer_of_tiles(quantizer, transforms, torch.float32)
    with pytest.raises(UserError, match=reason):
        ComfyUI().store(layer, (256, 128), torch.float32)


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "nvfp4", "convrot": True},
        {"format": "convrot_w4a4", "convrot_groupsize": 32},
        {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 0},
    ],
)
def test_unknown_rotations_are_not_read(settings: dict[str, Any]):
    with pytest.raises(UserError, match="which is not read"):
        read_marker("layer", torch.tensor(list(json.dumps(settings).encode())))


def test_small_layers_are_refused():
    layer = make_packed_layer(Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale()))
    with pytest.raises(UserError, match="not multiples of 16"):
        ComfyUI().store(layer, (24, 128), torch.float32)


def test_files_say_what_each_layer_is(tmp_path: Path):
    """By both of the ways that ComfyUI reads."""
    model = COMFYUI.save(tmp_path)
    with safe_open(tmp_path / "theirs/comfyui.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["_quantization_metadata"])
        markers = {}
        for key in file.keys():
            if key.endswith(".comfy_quant"):
                text = bytes(file.get_tensor(key).tolist())
                markers[key.removesuffix(".comfy_quant")] = json.loads(text)
    assert metadata == {"format_version": "1.0", "layers": markers}
    assert {value["format"] for value in markers.values()} == {"nvfp4", "mxfp8", "int8_tensorwise"}
    import_folder(str(tmp_path / "theirs"), str(tmp_path / "back"), [ComfyUI()])
    back: Any = FluxTransformer2DModel.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    for name in markers:
        ours, theirs = model.get_submodule(name), back.get_submodule(name)
        assert theirs.dequantize(torch.bfloat16).equal(ours.dequantize(torch.bfloat16))


def test_tensors_that_comfy_kitchen_quantized_are_read():
    kitchen: Any = pytest.importorskip("comfy_kitchen.backends.eager.quantization", reason=REASON)
    weight = torch.randn(32, 128)
    factor = weight.abs().amax() / (6.0 * 448.0)
    codes, scale = kitchen.quantize_nvfp4(weight, factor)
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": factor}
    stored = StoredLayer((32, 128), tensors, {"format": "nvfp4"})
    layout, buffers = ComfyUI().restore(stored)
    back = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert back.equal(dequantize_by_kitchen(stored, torch.float32))
