"""SDNQ's own package gets the same weights from what is stored for it."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.packed.targets.sdnq import SDNQ, matches
from fp4dit.packed.targets.sdnq_bits import pack, unpack
from fp4dit.packed.targets.sdnq_layout import WEIGHT_DTYPES
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard, RegularHadamard
from fp4dit.transforms.low_rank import LowRank, LowRankBF16
from fp4dit.transforms.refined_low_rank import RefinedLowRank
from fp4dit.transforms.smoothing import Smoothing
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
        assert value.shape == theirs[name].shape
        is_branch = name.startswith("svd")  # cast as scales are, from any dtype
        assert is_branch or value.dtype == theirs[name].dtype
        is_cast = is_branch or value.dtype in (torch.float32, torch.float8_e5m2)
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
        (nf4, AbsMax(fp16), torch.float32, "values are nf4: use weight.format of int2"),
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


@pytest.mark.parametrize("weights_dtype", ["uint4", "uint8", "uint3"])
def test_zero_points_that_are_not_whole_are_read_if_nothing_is_rounded(weights_dtype: str):
    """Products of codes and scales in bf16 are exact, so that fused sums are the same."""
    quantizer = pytest.importorskip("sdnq.quantizer", reason=REASON)
    dequantizer, tensors = quantizer.sdnq_quantize_layer_weight(
        torch.randn(24, 128), layer_class_name="Linear", weights_dtype=weights_dtype, group_size=32
    )
    tensors = {name: value for name, value in tensors.items() if value is not None}
    settings = {"weights_dtype": weights_dtype}
    with pytest.raises(UserError, match="zero points are not whole numbers"):
        SDNQ().restore(StoredLayer((24, 128), tensors, settings))
    rounded = {name: tensors[name].bfloat16().float() for name in ("scale", "zero_point")}
    stored = StoredLayer((24, 128), tensors | rounded, settings)
    layout, buffers = SDNQ().restore(stored)
    assert set(layout.encodings) == {"scale", "offset"}
    theirs = dequantizer(**stored.tensors, skip_compile=True)
    assert layout.dequantize(buffers, 128, layout.build_lookup_table()).equal(theirs)


@pytest.mark.parametrize("fmt", [fmt for fmt in WEIGHT_DTYPES.values() if fmt.bits < 8])
def test_codes_of_all_sizes(fmt: NumberFormat):
    scale = MinMax(fp16) if fmt.min == 0 else AbsMax(fp16)
    layer = make_layer(fmt, scale)
    stored = SDNQ().store(layer, (24, 128), torch.float32)
    assert dequantize_by_sdnq(stored, torch.float32).equal(layer.dequantize(torch.float32))
    layout, buffers = SDNQ().restore(stored)
    back = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert back.equal(layer.dequantize(torch.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7])
def test_codes_are_packed_as_by_sdnq(bits: int):
    packed_int = pytest.importorskip("sdnq.packed_int", reason=REASON)
    codes = torch.randint(0, 2**bits, (4, 16), dtype=torch.uint8)
    theirs = packed_int.pack_int(codes, f"uint{bits}")
    assert pack(codes.flatten(), bits).equal(theirs)
    assert unpack(theirs, bits).equal(codes.flatten())


ROTATION = Hadamard(32, signs=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "transforms",
    [
        [LowRank(8)],
        [LowRankBF16(8)],
        [ROTATION],
        [ROTATION, LowRank(8)],
        [RegularHadamard(64), RefinedLowRank(8)],
        [RegularHadamard(16)],
    ],
)
def test_branches_and_rotations_are_the_same(
    transforms: Sequence[TransformSpec], dtype: torch.dtype
):
    """The tensors are the same, and the weight that SDNQ makes of them is the layer's."""
    quantizer = Quantizer(floating(2, 1), PerGroup(32), AbsMax(BF16))
    layer = make_packed_layer(quantizer, dtype, transforms)
    stored = SDNQ().store(layer, (24, 128), dtype)
    theirs = dequantize_by_sdnq(stored, dtype).double()
    x = torch.eye(128, dtype=torch.float64)
    rotated, branch = layer.double().apply_transforms(x)
    ours = rotated @ layer.dequantize(torch.float64).T + (0 if branch is None else branch)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    assert (theirs - ours.T).norm() < tolerance * ours.norm()
    fitted = [transform for _, transform in SDNQ().restore_transforms(stored)]
    for mine, other in zip(layer.transform_chain, fitted, strict=True):
        for key, value in mine.state_dict().items():
            assert other.state_dict()[key].double().equal(value.double())
        assert other.double().transform_input(x).equal(mine.transform_input(x))


@pytest.mark.parametrize("size", [16, 64])
def test_other_rotations_are_refused(size: int):
    quantizer = Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16))
    for spec in (Hadamard(size, signs=False), Hadamard(32)):
        layer = make_packed_layer(quantizer, torch.float32, [spec])
        with pytest.raises(UserError, match="signs: false"):
            SDNQ().store(layer, (24, 128), torch.float32)


@pytest.mark.parametrize(
    ("k", "size", "spec"),
    [
        (512, 256, RegularHadamard(256)),  # the size of SDNQ's default
        (192, 256, RegularHadamard(64)),
        (128, 256, Hadamard(128, signs=False)),
        (36, 16, RegularHadamard(4)),
        (34, 16, None),
    ],
)
def test_rotations_are_read_by_their_size(k: int, size: int, spec: TransformSpec | None):
    settings = {"weights_dtype": "fp4", "use_hadamard": True, "hadamard_group_size": size}
    fitted = SDNQ().restore_transforms(StoredLayer((24, k), {}, settings))
    assert [found for found, _ in fitted] == ([] if spec is None else [spec])
    if spec is not None:
        quant_utils = pytest.importorskip("sdnq.quant_utils", reason=REASON)
        weight = torch.randn(24, k)
        theirs, _, _ = quant_utils.apply_hadamard(weight, size, layer_class_name="Linear")
        torch.testing.assert_close(spec(24, k).transform_weight(weight), theirs)


def test_smoothing_is_refused():
    quantizer = Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16))
    layer = make_packed_layer(quantizer, torch.float32, [Smoothing()])
    with pytest.raises(UserError, match="use transform=none"):
        SDNQ().store(layer, (24, 128), torch.float32)


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
