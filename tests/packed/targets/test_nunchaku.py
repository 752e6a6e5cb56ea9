"""Nunchaku's tensors, read as its documentation says, are the same layers; diffusers takes them."""

import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, NunchakuLiteQuantizationConfig
from diffusers.utils import constants, import_utils
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.numerics.block_scales import NVFP4Scale, PowerOfTwoNVFP4Scale
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.conversion import import_folder
from fp4dit.packed.targets.folders import read_config
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.packed.targets.nunchaku import NunchakuLite
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank, LowRankBF16
from fp4dit.transforms.smoothing import PowerOfTwoSmoothingSearch, Smoothing
from fp4dit.utils.errors import UserError
from tests.packed.targets.cases import NUNCHAKU, group
from tests.packed.targets.layers import BF16, make_layer_of_tiles

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

INT4 = group(integer(4), 64, AbsMax(BF16))
NVFP4 = group(floating(2, 1), 16, PowerOfTwoNVFP4Scale())
CHAIN = (PowerOfTwoSmoothingSearch(4), LowRankBF16(32, 2))


def nibbles(packed: Tensor) -> Tensor:
    """Return the 4-bit values of a tensor's bytes, the low half of each first."""
    data = packed.contiguous().flatten().view(torch.uint8).int()
    return torch.stack([data & 15, data >> 4], 1).flatten()


def read_codes(packed: Tensor, rows: int, k: int) -> Tensor:
    """Read `qweight` by the address of each code.

    A warp's tile of 128 outputs consists of 8 packs of 2 halves of 8 lanes, and a tile of 64 inputs
    of 2 halves of 4 lanes of 8 codes, which make a word of 32 bits.
    """
    n, c = torch.arange(rows)[:, None], torch.arange(k)[None]
    tile = n // 128 * (k // 64) + c // 64
    address = tile * 8 + n // 16 % 8  # the pack of outputs
    address = (address * 8 + n % 8) * 4 + c // 8 % 4  # the lanes of outputs and inputs
    address = (address * 2 + n // 8 % 2) * 2 + c // 32 % 2  # the halves
    return nibbles(packed)[address * 8 + c % 8]


def read_scales(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Read 16-bit scales: lane 0 holds those of outputs 0, 1, 8, 9, lane 1 of 2, 3, 10, 11, ..."""
    n, g = torch.arange(rows)[:, None], torch.arange(groups)[None]
    lane, place = n // 16 % 8 * 4 + n // 2 % 4, n // 8 % 2 * 2 + n % 2
    return packed.flatten()[(n // 128 * groups + g) * 128 + lane * 4 + place]


def read_micro_scales(packed: Tensor, rows: int, groups: int) -> Tensor:
    """Read E4M3 scales: lane 0 holds outputs 0, 32, 64, 96, lane 1 outputs 8, 40, 72, 104, ...

    and lane 4 outputs 1, 33, 65, 97; each with the scales of four groups of inputs.
    """
    n, g = torch.arange(rows)[:, None], torch.arange(groups)[None]
    lane, place = n % 8 * 4 + n // 8 % 4, n // 32 % 4
    address = (n // 128 * (groups // 4) + g // 4) * 128 + lane * 4 + place
    return packed.flatten().view(torch.uint8)[address * 4 + g % 4].view(torch.float8_e4m3fn).float()


def read_down(packed: Tensor, rank: int, k: int) -> Tensor:
    """Read `proj_down`: tiles of 16 x 16, of which a lane holds pairs of inputs."""
    n, c = torch.arange(rank)[:, None], torch.arange(k)[None]
    return packed.flatten()[low_rank_address(c // 16 * (rank // 16) + n // 16, n, c)]


def read_up(packed: Tensor, rows: int, rank: int) -> Tensor:
    """Read `proj_up`, whose tiles are of 16 outputs and 16 ranks."""
    n, c = torch.arange(rows)[:, None], torch.arange(rank)[None]
    return packed.flatten()[low_rank_address(n // 16 * (rank // 16) + c // 16, n, c)]


def low_rank_address(tile: Tensor, n: Tensor, c: Tensor) -> Tensor:
    lanes = n % 8 * 4 + c // 2 % 4
    return (((tile * 32 + lanes) * 2 + n // 8 % 2) * 2 + c // 8 % 2) * 2 + c % 2


def read_awq_codes(packed: Tensor, rows: int, k: int) -> Tensor:
    """Read AWQ's codes: 16 bits hold codes 0, 8, 16, 24 of 32, then 1, 9, 17, 25, ...

    4 outputs follow each other in blocks of 64 inputs.
    """
    n, c = torch.arange(rows)[:, None], torch.arange(k)[None]
    address = (n // 4 * (k // 64) + c // 64) * 4 + n % 4
    address = (address * 2 + c // 32 % 2) * 8 + c % 8
    return nibbles(packed)[address * 4 + c // 8 % 4]


def read_weight(stored: StoredLayer) -> Tensor:
    """Return the weight in fp32 by the functions above."""
    (rows, k), tensors, settings = stored.shape, stored.tensors, stored.settings
    groups = k // settings["group_size"]
    if settings["kind"] == "awq_w4a16":
        scale, added = (tensors[x].T.float() for x in ("wscales", "wzeros"))
        codes = read_awq_codes(tensors["qweight"], rows, k).float()
        return codes * scale.repeat_interleave(64, 1) + added.repeat_interleave(64, 1)
    codes = read_codes(tensors["qweight"], rows, k)
    if settings["precision"] == "int4":
        values = torch.where(codes > 7, codes - 16, codes).float()
        scale = read_scales(tensors["wscales"], rows, groups).float()
        return values * scale.repeat_interleave(64, 1)
    values = torch.tensor(E2M1_VALUES)[codes & 7] * (1 - 2 * (codes >> 3))
    factor = tensors["wtscale"].float() * read_scales(tensors["wcscales"], rows, 1).float()
    scale = read_micro_scales(tensors["wscales"], rows, groups) * factor
    return values * scale.repeat_interleave(16, 1)


def check_branch(stored: StoredLayer, layer: PackedLinear) -> None:
    """Check that Q(x / smooth) W^T + x down up^T is the layer, by its tensors in float64."""
    (rows, k), rank = stored.shape, stored.settings["rank"]
    smooth = read_scales(stored.tensors["smooth_factor"], k, 1).flatten()
    down = read_down(stored.tensors["proj_down"], rank, k).double()
    up = read_up(stored.tensors["proj_up"], rows, rank).double()
    probe = torch.eye(k, dtype=torch.float64)
    x, bypass = layer.double().apply_transforms(probe)
    assert x.equal(probe / smooth.double())
    assert (probe @ down.T @ up.T).equal(torch.zeros(k, rows) if bypass is None else bypass)


def make(
    quantizer: Quantizer,
    transforms: tuple[TransformSpec, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> PackedLinear:
    return make_layer_of_tiles(quantizer, transforms, dtype, seed)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "transforms", [(), CHAIN, CHAIN[::-1], CHAIN[:1], CHAIN[1:]], ids=lambda x: f"{len(x)}"
)
@pytest.mark.parametrize(
    "quantizer",
    [INT4, NVFP4, group(integer(4, signed=False), 64, MinMax(BF16))],
    ids=["int4", "nvfp4", "uint4"],
)
def test_layers_read_as_documented_are_the_same(
    quantizer: Quantizer, transforms: tuple[TransformSpec, ...], quantized: bool
):
    outcomes: Counter[str] = Counter()
    for seed in range(3):
        layer = make(quantizer, transforms, seed=seed)
        if quantized:
            layer.input_fake_quant = FakeQuantize(Quantizer(integer(8), PerToken(), AbsMax()))
        shape = (layer.out_features, layer.in_features)
        try:
            stored = NunchakuLite().store(layer, shape, torch.bfloat16)
        except UserError:
            outcomes["refused"] += 1
            continue
        outcomes[stored.settings["kind"]] += 1
        weight = layer.dequantize(torch.bfloat16)
        assert read_weight(stored).bfloat16().equal(weight)
        layout, buffers = pack_grid(NunchakuLite().decode(stored))
        back = layout.dequantize(buffers, layer.in_features, layout.build_lookup_table())
        assert back.bfloat16().equal(weight)
        if stored.settings["kind"] == "svdq_w4a4":
            layer.input_fake_quant = nn.Identity()
            check_branch(stored, layer)
    if quantizer.format.name == "uint4":  # its zero points times its scales are seldom of bf16
        assert not outcomes["svdq_w4a4"]
    else:
        is_awq = quantizer is INT4 and not transforms and not quantized
        assert outcomes == {"awq_w4a16" if is_awq else "svdq_w4a4": 3}


@pytest.mark.parametrize("quantizer", [group(integer(4), 64), NVFP4])
def test_layers_without_transforms_are_exact_in_fp16(quantizer: Quantizer):
    for seed in range(3):
        layer = make(quantizer, dtype=torch.float16, seed=seed)
        stored = NunchakuLite().store(layer, (256, 128), torch.float16)
        assert read_weight(stored).half().equal(layer.dequantize(torch.float16))


@pytest.mark.parametrize(
    ("quantizer", "transforms", "dtype", "reason"),
    [
        (group(integer(4), 64), CHAIN, torch.bfloat16, "use weight.scale.dtype=bf16"),
        (group(integer(4), 32), (), torch.bfloat16, "use weight.granularity.size=64"),
        (group(floating(2, 1), 16, NVFP4Scale()), (), torch.bfloat16, "rule=nvfp4_power_of_two"),
        (group(floating(3, 0), 64), (), torch.bfloat16, "use weight.format=int4"),
        (INT4, (), torch.float32, "use export_format.dtype=bfloat16"),
        (INT4, (Hadamard(),), torch.bfloat16, "use transform=smooth_low_rank_bf16 or none"),
        (INT4, (LowRankBF16(36),), torch.bfloat16, "rank=48"),
        (INT4, (LowRank(16),), torch.bfloat16, "use transform=smooth_low_rank_bf16"),
        (INT4, (Smoothing(), LowRankBF16(16)), torch.bfloat16, "reads smoothed inputs"),
    ],
)
def test_refusals_name_an_override(
    quantizer: Quantizer, transforms: tuple[TransformSpec, ...], dtype: torch.dtype, reason: str
):
    with pytest.raises(UserError, match=reason):
        NunchakuLite().store(make(quantizer, transforms, dtype), (256, 128), dtype)


@pytest.fixture
def nunchaku_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """diffusers' module, which downloads kernels when it is imported, with none."""
    kernels = ModuleType("kernels")
    kernels.get_kernel = lambda *args, **kwargs: SimpleNamespace(ops=None)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(import_utils, "_kernels_available", True)
    monkeypatch.setattr(import_utils, "_kernels_version", "0.13.0")
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    name = "diffusers.quantizers.nunchaku.utils"
    monkeypatch.delitem(sys.modules, name, raising=False)
    from diffusers.quantizers.nunchaku import utils

    yield utils
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NUNCHAKU)
def test_diffusers_makes_modules_of_the_same_names_and_shapes(
    name: str, nunchaku_modules: Any, tmp_path: Path
):
    NUNCHAKU[name].save(tmp_path)
    config = read_config(tmp_path / "theirs")
    settings = config.pop("quantization_config")
    state = load_file(tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    assert settings.pop("quant_method") == "nunchaku_lite"
    quantization = NunchakuLiteQuantizationConfig(**settings)
    with init_empty_weights():
        model: Any = FluxTransformer2DModel.from_config(config)
    nunchaku_modules.replace_with_nunchaku_linear(
        model, quantization.to_dict(), quantization.compute_dtype
    )
    nunchaku_modules.check_strict_state_dict_match(model, state)
    made = {key: (value.shape, value.dtype) for key, value in model.state_dict().items()}
    quantized = {
        target
        for key in ("svdq_w4a4", "awq_w4a16")
        if key in settings
        for target in settings[key]["targets"]
    }
    assert len(quantized) > 5
    for key, value in state.items():
        assert made[key][0] == value.shape, key
        if key.rpartition(".")[0] in quantized:
            assert made[key][1] == value.dtype, key


@pytest.mark.parametrize("name", NUNCHAKU)
def test_imported_models_compute_the_same(name: str, tmp_path: Path):
    model = NUNCHAKU[name].save(tmp_path)
    import_folder(str(tmp_path / "theirs"), str(tmp_path / "back"), [NunchakuLite()])
    back = FluxTransformer2DModel.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)
    for layer, theirs in back.named_modules():
        if not isinstance(theirs, PackedLinear):
            continue
        ours: Any = model.get_submodule(layer)
        assert theirs.dequantize(torch.float32).equal(ours.dequantize(torch.float32))
        assert (theirs.bias is None) == (ours.bias is None)
        assert theirs.bias is None or theirs.bias.equal(ours.bias)
        x = torch.randn(4, ours.in_features, dtype=torch.float64)
        for mine, other in zip(ours.apply_transforms(x), theirs.apply_transforms(x), strict=True):
            if mine is None or other is None:
                assert mine is other
            else:
                assert torch.allclose(mine, other, rtol=1e-12)
