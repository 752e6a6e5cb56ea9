"""Packed weights in the formats of torchao and compressed-tensors, and back: equal to the bit, or refused."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, QuantizeTensorToNVFP4Kwargs

import pipelines.convert
from fp4dit import policy
from fp4dit.blockscales import E4M3, E8M0, NVFP4, ceil, even, floor
from fp4dit.choice import Choice, LeastError
from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.formats import floating, fp16, integer
from fp4dit.grid import Grid
from fp4dit.hadamard import Hadamard
from fp4dit.packed import compressed, torchao
from fp4dit.packed.export import pack_transformer_
from fp4dit.packed.from_compressed import packed_
from fp4dit.packed.interchange import Counterpart, filled
from fp4dit.packed.layer import PackedLinear, packed
from fp4dit.packed.to_compressed import compressed as to_compressed
from fp4dit.policy import Rule, everywhere, wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax
from fp4dit.transforms import TransformSpec
from tests import tiny
from tests.conftest import Run
from tests.test_hub import answer

E2M1 = floating(2, 1)
NV = Quantizer(E2M1, Granularity("group", 16), NVFP4())
MX = Quantizer(E2M1, Granularity("group", 32), E8M0())
FILE = "diffusion_pytorch_model.safetensors"


def layer(
    quantizer: Quantizer,
    dtype: torch.dtype = torch.float32,
    transforms: Sequence[TransformSpec] = (),
    source: nn.Module | None = None,
    seed: int = 0,
) -> PackedLinear:
    torch.manual_seed(seed)
    source = (source or nn.Linear(128, 24)).to(dtype)
    with torch.no_grad():
        source.weight.mul_(torch.randn(len(source.weight)).exp().view(-1, *[1] * (source.weight.ndim - 1)))
        source.weight[3] = 0
    made = wrap(source, quantizer, transforms)
    made.prepare(torch.randn(3, 4, 128) if transforms else None).freeze()
    return packed(made)


def mx(format: Any) -> Quantizer:
    return replace(MX, format=format)


AO = {
    "nvfp4": (NV, torchao.NVFP4()),
    "nvfp4 of 4 or 6": (replace(NV, scale=NVFP4(256.0, (1.0, 1.5))), torchao.NVFP4()),
    "mxfp4": (MX, torchao.MX()),
    "mxfp6 e2m3": (mx(floating(2, 3)), torchao.MX(floating(2, 3))),
    "mxfp6 e3m2": (mx(floating(3, 2)), torchao.MX(floating(3, 2))),
    "mxfp8": (mx(E4M3), torchao.MX(E4M3)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", AO)
def test_torchao_reads_the_same_weight(name: str, dtype: torch.dtype):
    quantizer, counterpart = AO[name]
    own = layer(quantizer, dtype)
    linear = torchao.to_linear(own, counterpart)
    assert type(linear) is nn.Linear
    assert type(linear.weight).__name__ == counterpart.name
    assert linear.weight.dequantize().equal(own.dense(dtype))
    back = torchao.from_linear(linear, counterpart)
    assert back.dense(torch.float32).equal(own.dense(torch.float32))
    assert back.layout == own.layout
    assert all(back.held[part].equal(value) for part, value in own.held.items())
    assert back.dtype == dtype
    assert back.bias.equal(own.bias)


def test_torchao_multiplies_by_an_nvfp4_weight():
    own, x = layer(NV), torch.randn(5, 128)
    own.activation = Grid(NV)
    linear = torchao.to_linear(own, torchao.NVFP4())
    assert linear(own.activation(x)).equal(own(x))


@pytest.mark.parametrize("rule", [floor, even, ceil], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("format", torchao.ELEMENTS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchao_quantizes_an_input_and_multiplies_as_we_do(rule: Any, format: Any, dtype: torch.dtype):
    own = layer(MX, dtype)
    own.activation = Grid(Quantizer(format, Granularity("group", 32), E8M0(rule)))
    linear = torchao.to_linear(own, torchao.MX())
    x = (torch.randn(50, 128) * torch.randn(50, 4).exp().repeat_interleave(32, 1)).to(dtype)
    x[0] = 0
    assert linear(x).equal(own(x))
    assert torchao.from_linear(linear, torchao.MX())(x).equal(own(x))


def test_what_torchao_quantized_is_read_to_the_bit():
    torch.manual_seed(0)
    weight = torch.randn(24, 128)
    for theirs, counterpart in (
        (NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=weight.abs().max() / (448 * 6)), torchao.NVFP4()),
        (NVFP4Tensor.to_nvfp4(weight), torchao.NVFP4()),
        (NVFP4Tensor.to_nvfp4(torch.randn(128, 128), is_swizzled_scales=True), torchao.NVFP4()),
        (MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32), torchao.MX()),
        (MXTensor.to_mx(weight, torch.float8_e4m3fn, 32), torchao.MX(E4M3)),
    ):
        linear = nn.Linear(*theirs.shape[::-1], bias=False, device="meta")
        linear.weight = nn.Parameter(theirs, requires_grad=False)
        assert torchao.from_linear(linear, counterpart).dense(torch.float32).equal(theirs.dequantize())


def test_what_torchao_does_besides_is_refused():
    weight = torch.randn(128, 128)
    dynamic = NVFP4Tensor.to_nvfp4(weight, act_quant_kwargs=QuantizeTensorToNVFP4Kwargs())
    linear = nn.Linear(128, 128, bias=False, device="meta")
    linear.weight = nn.Parameter(dynamic, requires_grad=False)
    with pytest.raises(UserError, match="quantizes its input to NVFP4"):
        torchao.from_linear(linear, torchao.NVFP4())
    rceil = QuantizeTensorToMXKwargs(torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.RCEIL)
    linear.weight = nn.Parameter(MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, act_quant_kwargs=rceil))
    with pytest.raises(UserError, match="no rule here does to the bit"):
        torchao.from_linear(linear, torchao.MX())
    with pytest.raises(UserError, match="swizzled"):
        torchao.MX().read({"weight": MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32, is_swizzled_scales=True)})
    with pytest.raises(UserError, match="no e2m1"):
        torchao.MX().read({"weight": MXTensor.to_mx(weight, torch.float8_e4m3fn, 32)})
    with pytest.raises(UserError, match="is Tensor, and no NVFP4Tensor"):
        torchao.NVFP4().read({"weight": weight})


def test_a_scale_that_torchao_would_lose_in_fp16_is_refused():
    own = layer(MX, torch.float16)
    own.scale[0] = 127 - 25  # 2^-25 is no number of fp16, and 6 * 2^-25 is one
    own.codes[0] = 0x77
    with pytest.raises(UserError, match=r"other values in torch\.float16"):
        torchao.MX().write(own)


def documented(kept: Mapping[str, Tensor]) -> np.ndarray:
    """What compressed-tensors' formats stand for, in fp32 and without torch: E2M1 from the low half of a byte first,
    times E4M3 / global scale, or times 2^(E8M0 - 127)."""
    packed = kept["weight_packed"].numpy()
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(len(packed), -1)
    values = codes.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scale = kept["weight_scale"]
    if "weight_global_scale" in kept:
        numbers = scale.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        scales = numbers / kept["weight_global_scale"].numpy()
    else:
        scales = scale.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return values * scales.repeat(values.shape[1] // scales.shape[1], 1)


CT = {
    "nvfp4": (NV, compressed.NVFP4()),
    "nvfp4 of 4 or 6": (replace(NV, scale=NVFP4(256.0, (1.0, 1.5))), compressed.NVFP4()),
    "mxfp4": (MX, compressed.MXFP4()),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CT)
def test_compressed_tensors_stand_for_the_same_weight(name: str, dtype: torch.dtype):
    quantizer, counterpart = CT[name]
    for seed in range(5):
        own = layer(quantizer, dtype, seed=seed)
        kept = counterpart.write(own)
        theirs = torch.from_numpy(documented(kept))
        assert theirs.to(dtype).equal(own.dense(dtype))
        layout, held = counterpart.read(kept)
        back = filled(nn.Linear(128, 24, device="meta", dtype=dtype), layout, held, "cpu")
        assert back.dense(torch.float32).equal(theirs)
        assert back.codes.equal(own.codes)


def test_in_fp32_a_quotient_is_taken_only_where_it_rounds_as_the_product():
    reasons = []
    for seed in range(20):
        own = layer(NV, seed=seed)
        try:
            kept = compressed.NVFP4().write(own)
            assert torch.from_numpy(documented(kept)).equal(own.dense(torch.float32))
        except UserError as error:
            reasons.append(str(error))
    assert 0 < len(reasons) < 20
    assert all("torch.float32 rounds the weight" in reason for reason in reasons)


REFUSED = {
    "a group of 128": (replace(NV, granularity=Granularity("group", 128)), {}, "128 values share a scale"),
    "fp16 scales": (replace(NV, scale=AbsMax(fp16)), {}, "scales are not"),
    "fp32 scales in blocks of 32": (replace(MX, scale=AbsMax()), {}, "not powers of two"),
    "a factor on powers of two": (replace(MX, scale=E8M0(factor=4 / 3)), {}, "not powers of two"),
    "e3m0": (replace(NV, format=floating(3, 0)), {}, "values are e3m0, and not e2m1"),
    "int4": (replace(NV, format=integer(4)), {}, "values are int4"),
    "a zero point": (replace(NV, scale=MinMax(fp16)), {}, "scale and zero"),
    "either of two": (
        replace(NV, format=Choice((E2M1, integer(4)), LeastError(), "block")),
        {},
        "e2m1 or int4",
    ),
    "a rotation": (NV, {"transforms": (Hadamard(16),)}, r"transforms its input \(BlockHadamard|transforms its input"),
    "a convolution": (NV, {"source": nn.Conv2d(32, 24, 2)}, "convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize(
    "pair", [(torchao.NVFP4(), torchao.MX()), compressed.FORMATS], ids=["torchao", "compressed-tensors"]
)
def test_what_others_cannot_keep_is_refused(name: str, pair: tuple[Counterpart, Counterpart]):
    quantizer, others, reason = REFUSED[name]
    own = layer(quantizer, torch.bfloat16, **others)
    messages = []
    for counterpart in pair:
        with pytest.raises(UserError) as error:
            counterpart.write(own)
        messages.append(str(error.value))
    assert any(part in message for part in reason.split("|") for message in messages), messages


def quantized(weight: list[Rule], activation: list[Rule], dtype: torch.dtype = torch.bfloat16) -> Any:
    torch.manual_seed(0)
    dit = tiny.transformer().eval().to(dtype)
    rules, clock = policy.assign(policy.layers(dit), weight), Clock()
    for own in policy.quantize_weights_(dit, rules, clock=clock).values():
        own.prepare()
        own.freeze()
    inputs = policy.quantize_activations_(dit, activation)[1] if activation else {}
    pack_transformer_(dit, rules, inputs)
    return dit


LEFT = ["proj_out", "*adaln_single*"]
BY_ROW = everywhere(NV, by_row=["pos_embed.proj"], leave=LEFT)


def test_a_model_has_the_names_of_the_plain_one_and_says_what_is_left_as_it_is():
    own = quantized(BY_ROW, [Rule("*", Quantizer(floating(4, 3), Granularity("row")))])
    made = to_compressed(own, dense=["pos_embed.proj"])
    plain = tiny.transformer().state_dict()
    names = {name.replace(".weight_packed", ".weight") for name in made.state}
    assert {name for name in names if "weight_" not in name} == set(plain)
    ignored = {name for name, module in tiny.transformer().named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    ignored -= {name.removesuffix(".weight_packed") for name in made.state if name.endswith("weight_packed")}
    assert set(made.config["ignore"]) == ignored >= {"proj_out", "pos_embed.proj"}
    assert made.state["pos_embed.proj.weight"].shape == plain["pos_embed.proj.weight"].shape
    assert made.state["pos_embed.proj.weight"].flatten(1).equal(own.pos_embed.proj.dense(torch.bfloat16))
    assert made.state["proj_out.weight"].equal(own.proj_out.weight)
    [group] = made.config["config_groups"].values()
    assert (group["targets"], group["input_activations"], made.config["format"]) == (
        ["Linear"],
        None,
        "nvfp4-pack-quantized",
    )
    assert any("cannot describe" in note for note in made.notes)
    assert any("attention" in note for note in made.notes)


def test_the_layer_that_cannot_be_converted_is_named():
    with pytest.raises(UserError, match=r"^pos_embed\.proj: .*convolution"):
        to_compressed(quantized(BY_ROW, []))
    blocks = replace(NV, granularity=Granularity("group", 32))
    with pytest.raises(UserError, match=r"pos_embed\.proj: [^\n]*\n.* and 6 more: .*32 values share") as error:
        to_compressed(quantized(everywhere(blocks, by_row=["pos_embed.proj"]), []))
    assert "proj_out" not in str(error.value)
    ranges = quantized(everywhere(NV, by_row=["pos_embed.proj"], ranges=[500]), [])
    with pytest.raises(UserError, match=r"\.ranges\.0 is for one range of timesteps"):
        to_compressed(ranges, dense=["pos_embed.proj"])
    with pytest.raises(UserError, match="no packed layer is left"):
        to_compressed(tiny.transformer())


def test_formats_and_inputs_are_told_apart_by_name():
    blocks = [Rule("*attn*", MX), Rule("*ff*", NV), Rule("*", None)]
    made = to_compressed(quantized(blocks, [Rule("*attn1.to_[qkv]", MX), Rule("*attn?.[qkv]", None), Rule("*", None)]))
    groups = made.config["config_groups"].values()
    assert made.config["format"] == "mixed-precision"
    found = {(g["format"], g["input_activations"] is not None): g["targets"] for g in groups}
    assert len(found[("mxfp4-pack-quantized", True)]) == 6
    assert all("attn" in name for name in found[("mxfp4-pack-quantized", False)])
    assert all("ff" in name for name in found[("nvfp4-pack-quantized", False)])


def test_their_scales_of_inputs_are_ours():
    """The rule of MXFP4's online scales as compressed-tensors has it: the largest value with a quarter of its binade
    added, floored to a power of two, over 4."""
    x = (torch.randn(4, 7, 96) * torch.logspace(-6, 6, 7)[:, None]).bfloat16()
    blocks = x.float().view(-1, 32)
    bits = (blocks.abs().amax(1).view(torch.int32) + (1 << 21)) >> 23
    scales = np.array([math.ldexp(1, int(b) - 127 - 2) for b in bits], np.float32)
    theirs = (blocks.numpy() / scales[:, None]).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    ours = Grid(compressed.MXFP4_INPUTS)(x)
    assert ours.equal(torch.from_numpy(theirs * scales[:, None]).view_as(x).bfloat16())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A transformer packed to MXFP4, weights and inputs, without what is no linear layer."""
    leave = ["pos_embed.proj"]
    quantized(everywhere(MX, leave=leave), [Rule("*attn?.[qkv]", None), Rule("*", MX)], torch.float32).save_pretrained(
        tmp_path / "ours"
    )
    return tmp_path


def test_the_command_there_and_back(folder: Path, run: Run, capsys):
    given = [f"path={folder}/ours", "to=compressed_tensors", f"out={folder}/theirs"]
    assert run(*given, main=pipelines.convert.main, outputs=False) == 0
    assert "26 layers are mxfp4-pack-quantized" in capsys.readouterr().out
    assert run(*given, main=pipelines.convert.main, outputs=False) == 1
    assert "give a new folder" in capsys.readouterr().err
    assert run(*given[:2], f"out={folder}/half", "to.dtype=int4", main=pipelines.convert.main, outputs=False) == 1
    assert "choose bfloat16, float16, float32" in capsys.readouterr().err
    assert run(*given[:2], f"out={folder}/half", "to.dtype=bfloat16", main=pipelines.convert.main, outputs=False) == 0
    assert load_file(folder / "half" / FILE)["proj_out.bias"].dtype == torch.bfloat16
    back = [f"path={folder}/theirs", "to=fp4dit", f"out={folder}/back"]
    assert run(*back, main=pipelines.convert.main, outputs=False) == 0
    assert run(*back[:2], f"out={folder}/more", f"path={folder}/ours", main=pipelines.convert.main, outputs=False) == 1
    assert "has to be by compressed-tensors" in capsys.readouterr().err
    before, after = (PixArtTransformer2DModel.from_pretrained(folder / name) for name in ("ours", "back"))
    state, other = before.state_dict(), after.state_dict()
    assert state.keys() == other.keys()
    assert all(other[name].equal(value) for name, value in state.items())
    assert answer(after).equal(answer(before))


def test_a_changed_checkpoint_is_not_read(folder: Path, run: Run, capsys):
    given = [f"path={folder}/ours", "to=compressed_tensors", f"out={folder}/theirs"]
    assert run(*given, main=pipelines.convert.main, outputs=False) == 0
    state, config = load_file(folder / "theirs" / FILE), json.loads((folder / "theirs/config.json").read_text())
    own = config["quantization_config"]
    name = next(name.removesuffix(".weight_packed") for name in state if name.endswith("weight_packed"))

    def reading(changed: Mapping[str, Tensor], described: Mapping[str, Any] = own) -> None:
        packed_(tiny.transformer(), changed, described)

    reading(state)
    lacking = {key: value for key, value in state.items() if key != f"{name}.weight_scale"}
    with pytest.raises(UserError, match="lacks weight_scale"):
        reading(lacking)
    with pytest.raises(UserError, match="NaN or infinite"):
        reading(state | {f"{name}.weight_scale": torch.full_like(state[f"{name}.weight_scale"], 255)})
    with pytest.raises(UserError, match=r"scales \[1, 1\] for codes"):
        reading(state | {f"{name}.weight_scale": state[f"{name}.weight_scale"][:1, :1]})
    with pytest.raises(UserError, match="not of uint8"):
        reading(state | {f"{name}.weight_scale": state[f"{name}.weight_scale"].float()})
    with pytest.raises(UserError, match="of other shape"):
        reading({key: value[:1] if key.startswith(f"{name}.weight") else value for key, value in state.items()})
    with pytest.raises(UserError, match="is no linear layer"):
        reading({f"x.{key}": value for key, value in state.items()})
    with pytest.raises(UserError, match="not of PixArt"):
        reading(state | {"another": torch.zeros(1)})
    group = own["config_groups"]["group_0"]
    for key, value, message in (
        ("output_activations", {"num_bits": 8}, "the output of .* is quantized"),
        ("format", "int-quantized", "int-quantized, and only nvfp4"),
        ("targets", ["re:nothing"], "no group"),
        ("input_activations", {"num_bits": 8}, "the input of .* is quantized as"),
    ):
        changed = own | {"config_groups": {"group_0": group | {key: value}}}
        with pytest.raises(UserError, match=message):
            reading(state, changed)
    with pytest.raises(UserError, match="has a transform_config"):
        reading(state, own | {"transform_config": {"config_groups": {}}})
    save_file(state, folder / "theirs" / FILE)
    data = (folder / "theirs" / FILE).read_bytes()
    (folder / "theirs" / FILE).write_bytes(data[:-9])
    assert run(f"path={folder}/theirs", "to=fp4dit", f"out={folder}/b", main=pipelines.convert.main, outputs=False) == 1
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantizer", "activation"), [(NV, []), (MX, []), (MX, [Rule("*attn?.[qkv]", None), Rule("*", MX)])]
)
def test_the_package_itself_makes_the_same_model(quantizer: Quantizer, activation: list[Rule]):
    """Loaded as transformers does. The package computes in bf16."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    own = quantized(everywhere(quantizer, leave=["pos_embed.proj", *LEFT]), activation)
    made = to_compressed(own)
    config = quantization.QuantizationConfig(**made.config)
    theirs = tiny.transformer().bfloat16()
    quantization.apply_quantization_config(theirs, config, run_compressed=False)
    compressor = compressors.ModelCompressor(quantization_config=config)
    compressor.compress_model(theirs)
    theirs.load_state_dict(made.state)
    compressor.decompress_model(theirs)
    for name, module in own.named_modules():
        if isinstance(module, PackedLinear):
            assert theirs.get_submodule(name).weight.equal(module.dense(torch.bfloat16)), name
        elif isinstance(module, nn.Linear):
            assert theirs.get_submodule(name).weight.equal(module.weight), name
    assert answer(theirs).equal(answer(own))
