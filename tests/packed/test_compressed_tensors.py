"""Conversions to compressed-tensors and back are bit-exact, or refused."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

import pipelines.convert
from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.linear import PackedConv, PackedLinear
from fp4dit.packed.targets import compressed_formats
from fp4dit.packed.targets.base import StoredModel
from fp4dit.packed.targets.compressed_tensors import CompressedTensors
from fp4dit.packed.targets.export import describe_export, store_model
from fp4dit.packed.targets.grid import pack_grid, read_grid
from fp4dit.packed.targets.importing import make_filled_layer, restore_model_
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.utils.errors import UserError
from tests.conftest import Run
from tests.helpers import tiny
from tests.helpers.packing import make_packed_layer, pack_model
from tests.packed.test_diffusers import run_transformer

E2M1 = floating(2, 1)
NV = Quantizer(E2M1, PerGroup(16), NVFP4Scale())
MX = Quantizer(E2M1, PerGroup(32), E8M0Scale())
FILE = "diffusion_pytorch_model.safetensors"


def decode_without_torch(tensors: Mapping[str, Tensor]) -> np.ndarray:
    """Decode a weight in fp32 without torch, as compressed-tensors documents its formats.

    The values are E2M1, the low half of a byte first, times E4M3 / global scale or 2^(E8M0 - 127).
    """
    packed = tensors["weight_packed"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = tensors["weight_scale"]
    if "weight_global_scale" in tensors:
        numbers = scale.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scales = numbers / tensors["weight_global_scale"].numpy()
    else:
        scales = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values * scales.repeat(values.shape[1] // scales.shape[1], 1)


CT = {
    "nvfp4": (NV, compressed_formats.CompressedNVFP4()),
    "nvfp4 of 4 or 6": (
        replace(NV, scale=NVFP4Scale(256.0, (1.0, 1.5))),
        compressed_formats.CompressedNVFP4(),
    ),
    "mxfp4": (MX, compressed_formats.CompressedMXFP4()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CT)
def test_formats_hold_the_same_weight(name: str, dtype: torch.dtype):
    quantizer, fmt = CT[name]
    for seed in range(5):
        layer = make_packed_layer(quantizer, dtype, seed=seed)
        tensors = fmt.encode(read_grid(layer), dtype)
        theirs = torch.from_numpy(decode_without_torch(tensors))
        assert theirs.to(dtype).equal(layer.dequantize(dtype))
        layout, buffers = pack_grid(fmt.decode(tensors))
        imported = make_filled_layer(
            nn.Linear(128, 24, device="meta", dtype=dtype), layout, buffers
        )
        assert imported.dequantize(torch.float32).equal(theirs)
        assert imported.codes.equal(layer.codes)


def test_fp32_scales_are_refused_if_inexact():
    reasons = []
    for seed in range(20):
        layer = make_packed_layer(NV, seed=seed)
        try:
            tensors = compressed_formats.CompressedNVFP4().encode(read_grid(layer), torch.float32)
            assert torch.from_numpy(decode_without_torch(tensors)).equal(
                layer.dequantize(torch.float32)
            )
        except UserError as error:
            reasons.append(str(error))
    assert 0 < len(reasons) < 20
    assert all("torch.float32 rounds the weight" in reason for reason in reasons)


REFUSED = {
    "a group of 128": (
        replace(NV, granularity=PerGroup(128)),
        {},
        "128 values share a scale",
    ),
    "fp16 scales": (replace(NV, scale=AbsMax(fp16)), {}, "scales are not"),
    "fp32 scales in blocks of 32": (replace(MX, scale=AbsMax()), {}, "not powers of two"),
    "a factor on powers of two": (
        replace(MX, scale=E8M0Scale(factor=4 / 3)),
        {},
        "not powers of two",
    ),
    "e3m0": (replace(NV, format=floating(3, 0)), {}, "values are e3m0, and not e2m1"),
    "int4": (replace(NV, format=integer(4)), {}, "values are int4"),
    "a zero point": (replace(NV, scale=MinMax(fp16)), {}, "scale and zero"),
    "either of two": (
        replace(NV, format=FormatSelection((E2M1, integer(4)), LeastError(), "block")),
        {},
        "e2m1 or int4",
    ),
    "a rotation": (
        NV,
        {"transforms": (Hadamard(16),)},
        r"transforms its input \(",
    ),
    "a convolution": (NV, {"source": nn.Conv2d(32, 24, 2)}, "convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_layers_are_refused(name: str):
    quantizer, others, reason = REFUSED[name]
    layer = make_packed_layer(quantizer, torch.bfloat16, **others)
    shape = (24, 32, 2, 2) if isinstance(layer, PackedConv) else (24, 128)
    with pytest.raises(UserError, match=reason):
        CompressedTensors().encode(layer, shape)


def compress_model(packed: Any, dense: Sequence[str] = ()) -> StoredModel:
    config = dict(tiny.transformer().config) | {"_class_name": "PixArtTransformer2DModel"}
    target, skeleton = CompressedTensors(), tiny.transformer()
    return store_model(packed, target, config, skeleton, torch.bfloat16, dense)


def build_files(stored: StoredModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the `quantization_config` of a stored model."""
    state, config = CompressedTensors().build_files(stored)
    return state, config["quantization_config"]


LEFT = ["proj_out", "*adaln_single*"]
BY_ROW = tiny.rules_for(NV, per_channel_layers=["pos_embed.proj"], ignore=LEFT)


def test_names_are_those_of_the_plain_model():
    packed = pack_model(BY_ROW, [Rule("*", Quantizer(floating(4, 3), PerChannel()))])
    compressed = compress_model(packed, dense=["pos_embed.proj"])
    state, config = build_files(compressed)
    plain = tiny.transformer().state_dict()
    names = {name.replace(".weight_packed", ".weight") for name in state}
    assert {name for name in names if "weight_" not in name} == set(plain)
    ignored = {
        name
        for name, module in tiny.transformer().named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    ignored -= {
        name.removesuffix(".weight_packed") for name in state if name.endswith("weight_packed")
    }
    assert set(config["ignore"]) == ignored >= {"proj_out", "pos_embed.proj"}
    assert state["pos_embed.proj.weight"].shape == plain["pos_embed.proj.weight"].shape
    assert (
        state["pos_embed.proj.weight"]
        .flatten(1)
        .equal(packed.pos_embed.proj.dequantize(torch.bfloat16))
    )
    assert state["proj_out.weight"].equal(packed.proj_out.weight)
    [group] = config["config_groups"].values()
    assert (group["targets"], group["input_activations"], config["format"]) == (
        ["Linear"],
        None,
        "nvfp4-pack-quantized",
    )
    notes = list(describe_export(packed, CompressedTensors(), compressed))
    assert any("cannot describe" in note for note in notes)
    assert any("attention" in note for note in notes)


def test_refusals_name_the_layer():
    with pytest.raises(UserError, match=r"^pos_embed\.proj: .*convolution"):
        compress_model(pack_model(BY_ROW, []))
    blocks = replace(NV, granularity=PerGroup(32))
    with pytest.raises(
        UserError, match=r"pos_embed\.proj: [^\n]*\n.* and 6 more: .*32 values share"
    ) as error:
        compress_model(
            pack_model(tiny.rules_for(blocks, per_channel_layers=["pos_embed.proj"]), [])
        )
    assert "proj_out" not in str(error.value)
    ranges = pack_model(
        tiny.rules_for(NV, per_channel_layers=["pos_embed.proj"], timestep_boundaries=[500]), []
    )
    with pytest.raises(UserError, match=r"\.ranges\.0 is for one range of timesteps"):
        compress_model(ranges, dense=["pos_embed.proj"])
    with pytest.raises(UserError, match="no packed layer is left"):
        compress_model(tiny.transformer())


def test_groups_of_the_config():
    blocks = [Rule("*attn*", MX), Rule("*ff*", NV), Rule("*", None)]
    activation = [Rule("*attn1.to_[qkv]", MX), Rule("*attn?.[qkv]", None), Rule("*", None)]
    _, config = build_files(compress_model(pack_model(blocks, activation)))
    groups = config["config_groups"].values()
    assert config["format"] == "mixed-precision"
    targets = {(g["format"], g["input_activations"] is not None): g["targets"] for g in groups}
    assert len(targets[("mxfp4-pack-quantized", True)]) == 6
    assert all("attn" in name for name in targets[("mxfp4-pack-quantized", False)])
    assert all("ff" in name for name in targets[("nvfp4-pack-quantized", False)])


def test_dynamic_scales_are_equal():
    """Check MXFP4's dynamic scales against the rule of compressed-tensors.

    It adds a quarter of its binade to the largest value, rounds down to a power of two, and divides
    by 4.
    """
    x = (torch.randn(4, 7, 96) * torch.logspace(-6, 6, 7)[:, None]).bfloat16()
    blocks = x.float().view(-1, 32)
    bits = (blocks.abs().amax(1).view(torch.int32) + (1 << 21)) >> 23
    scales = np.array([math.ldexp(1, int(b) - 127 - 2) for b in bits], np.float32)
    theirs = (
        (blocks.numpy() / scales[:, None])
        .clip(-6, 6)
        .astype(ml_dtypes.float4_e2m1fn)
        .astype(np.float32)
    )
    ours = FakeQuantize(compressed_formats.MXFP4_INPUTS)(x)
    assert ours.equal(torch.from_numpy(theirs * scales[:, None]).view_as(x).bfloat16())


@pytest.fixture
def mxfp4_folder(tmp_path: Path) -> Path:
    """Save a transformer whose linear layers and inputs are in MXFP4, in `ours`."""
    leave = ["pos_embed.proj"]
    pack_model(
        tiny.rules_for(MX, ignore=leave), [Rule("*attn?.[qkv]", None), Rule("*", MX)], torch.float32
    ).save_pretrained(tmp_path / "ours")
    return tmp_path


def convert(run: Run, source: Path, out: Path, *options: str) -> int:
    """Run the command, and return its exit status."""
    arguments = (f"path={source}", f"out={out}", *options)
    return run(*arguments, main=pipelines.convert.main, outputs=False)


TO_COMPRESSED, TO_FP4DIT = "export_format=compressed_tensors", "export_format=fp4dit"


def test_convert_there_and_back(mxfp4_folder: Path, run: Run, capsys):
    ours, theirs = mxfp4_folder / "ours", mxfp4_folder / "theirs"
    assert convert(run, ours, theirs, TO_COMPRESSED) == 0
    assert "26 layers are mxfp4-pack-quantized" in capsys.readouterr().out
    assert convert(run, theirs, mxfp4_folder / "back", TO_FP4DIT) == 0
    before = PixArtTransformer2DModel.from_pretrained(ours)
    after = PixArtTransformer2DModel.from_pretrained(mxfp4_folder / "back")
    state, other_state = before.state_dict(), after.state_dict()
    assert state.keys() == other_state.keys()
    assert all(other_state[name].equal(value) for name, value in state.items())
    assert run_transformer(after).equal(run_transformer(before))


def test_convert_to_another_dtype(mxfp4_folder: Path, run: Run):
    out = mxfp4_folder / "half"
    dtype = "export_format.dtype=bfloat16"
    assert convert(run, mxfp4_folder / "ours", out, TO_COMPRESSED, dtype) == 0
    assert load_file(out / FILE)["proj_out.bias"].dtype == torch.bfloat16


def test_mistakes_in_arguments_are_refused(mxfp4_folder: Path, run: Run, capsys):
    ours = mxfp4_folder / "ours"
    assert convert(run, ours, mxfp4_folder, TO_COMPRESSED) == 1
    assert "give a new folder" in capsys.readouterr().err
    dtype = "export_format.dtype=int4"
    assert convert(run, ours, mxfp4_folder / "new", TO_COMPRESSED, dtype) == 1
    assert "choose bfloat16, float16, float32" in capsys.readouterr().err
    assert convert(run, ours, mxfp4_folder / "new", TO_FP4DIT) == 1
    assert "has to be by one of" in capsys.readouterr().err


@pytest.fixture
def compressed(mxfp4_folder: Path, run: Run) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config of a transformer in MXFP4 of compressed-tensors."""
    folder = mxfp4_folder / "theirs"
    assert convert(run, mxfp4_folder / "ours", folder, TO_COMPRESSED) == 0
    config = json.loads((folder / "config.json").read_text())
    return load_file(folder / FILE), config["quantization_config"]


def load_compressed(state: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> None:
    target, skeleton = CompressedTensors(), tiny.transformer()
    config = {"quantization_config": quantization}
    stored = target.parse_files(state, config, skeleton, torch.float32)
    restore_model_(skeleton, stored, target)


def test_changed_tensors_are_refused(compressed):
    state, config = compressed
    key = next(key for key in state if key.endswith("weight_scale"))
    name, scale = key.removesuffix(".weight_scale"), state[key]
    short = {key: value[:1] for key, value in state.items() if key.startswith(f"{name}.weight")}
    changes = {
        "NaN or infinite": state | {key: torch.full_like(scale, 255)},
        r"scales \[1, 1\] for codes": state | {key: scale[:1, :1]},
        "not of uint8": state | {key: scale.float()},
        "other shape than": state | short,
        "lacks weight_scale": {other: value for other, value in state.items() if other != key},
        "no quantized layer": {f"x.{other}": value for other, value in state.items()},
        "not of PixArt": state | {"another": torch.zeros(1)},
    }
    load_compressed(state, config)
    for message, changed in changes.items():
        with pytest.raises(UserError, match=message):
            load_compressed(changed, config)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("output_activations", {"num_bits": 8}, "the output of .* is quantized"),
        ("format", "int-quantized", "int-quantized, and only nvfp4"),
        ("targets", ["re:nothing"], "no group"),
        ("input_activations", {"num_bits": 8}, "the input of .* is quantized as"),
    ],
)
def test_changed_groups_are_refused(compressed, key: str, value: Any, message: str):
    state, config = compressed
    group = config["config_groups"]["group_0"] | {key: value}
    with pytest.raises(UserError, match=message):
        load_compressed(state, config | {"config_groups": {"group_0": group}})


def test_a_transform_config_is_refused(compressed):
    state, config = compressed
    with pytest.raises(UserError, match="has a transform_config"):
        load_compressed(state, config | {"transform_config": {"config_groups": {}}})


def test_a_truncated_file_is_refused(mxfp4_folder: Path, compressed, run: Run, capsys):
    path = mxfp4_folder / "theirs" / FILE
    path.write_bytes(path.read_bytes()[:-9])
    assert convert(run, mxfp4_folder / "theirs", mxfp4_folder / "back", TO_FP4DIT) == 1
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantizer", "activation"),
    [(NV, []), (MX, []), (MX, [Rule("*attn?.[qkv]", None), Rule("*", MX)])],
)
def test_compressed_tensors_loads_the_same_model(quantizer: Quantizer, activation: list[Rule]):
    """Load the model as transformers does, in bf16, because the package computes in bf16."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    packed = pack_model(tiny.rules_for(quantizer, ignore=["pos_embed.proj", *LEFT]), activation)
    state, quantization_config = build_files(compress_model(packed))
    config = quantization.QuantizationConfig(**quantization_config)
    theirs = tiny.transformer().bfloat16()
    quantization.apply_quantization_config(theirs, config, run_compressed=False)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(theirs)
    theirs.load_state_dict(state)
    compressor.decompress_model(theirs)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            assert theirs.get_submodule(name).weight.equal(module.dequantize(torch.bfloat16)), name
        elif isinstance(module, nn.Linear):
            assert theirs.get_submodule(name).weight.equal(module.weight), name
    assert run_transformer(theirs).equal(run_transformer(packed))
