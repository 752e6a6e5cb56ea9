"""Packed bits, codes and scales are exact, and packed layers equal the simulated ones."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale, floor_exponent
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import Format, floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import PerChannel, PerGroup, PerTensor, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.encoding.layout import Layout
from fp4dit.packed.encoding.packing import pack_weight
from fp4dit.packed.encoding.qparams import (
    E4M3Encoding,
    E8M0Encoding,
    FloatEncoding,
    SignedE4M3Encoding,
    UIntEncoding,
    smallest_encoding,
)
from fp4dit.packed.model import uncastable_state_keys
from fp4dit.packed.nn.linear import PackedLinear, pack_layers_
from fp4dit.quantization import apply, rules
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantConv
from fp4dit.quantization.observers import SampleObserver
from fp4dit.quantization.rules import Rule
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing
from fp4dit.utils import bitpack
from fp4dit.utils.errors import UserError
from tests.helpers import tiny
from tests.helpers.tiny import transformer

FORMATS: list[Format] = [
    *(
        floating(e, m, signed=s)
        for e in range(1, 6)
        for m in range(5)
        for s in (True, False)
        if 2 <= e + m + s <= 8
    ),
    *(integer(n, signed=s) for n in range(2, 9) for s in (True, False)),
    floating(4, 3, reserved=1),
    nf4,
]
KIND = torch.zeros(1, dtype=torch.uint8)


@given(
    st.integers(1, 8).flatmap(
        lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))
    )
)
def test_packed_bits_form_a_binary_number(drawn):
    width, numbers = drawn
    row = torch.tensor([numbers], dtype=torch.uint8)
    packed = bitpack.pack_bits(row, width)
    whole = sum(number << width * i for i, number in enumerate(numbers))
    assert bytes(packed[0].tolist()) == whole.to_bytes(
        bitpack.packed_size(len(numbers), width), "little"
    )
    assert bitpack.unpack_bits(packed, width, len(numbers)).equal(row)


def test_first_of_two_codes_is_the_low_half():
    assert bitpack.pack_bits(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]


def test_values_of_too_many_bits_are_refused():
    with pytest.raises(ValueError, match="do not fit into 4 bits"):
        bitpack.pack_bits(torch.tensor([16], dtype=torch.uint8), 4)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_value_has_its_own_code(fmt: Format):
    codes = encode_values(fmt.values(), list_code_values(fmt))
    assert len(codes.unique()) == len(fmt.values())
    assert int(codes.max()) < 2**fmt.bits
    assert list_code_values(fmt)[codes.int()].equal(fmt.values())


@pytest.mark.parametrize(
    ("fmt", "theirs"),
    [
        (floating(2, 1), ml_dtypes.float4_e2m1fn),
        (floating(2, 3), ml_dtypes.float6_e2m3fn),
        (floating(3, 2), ml_dtypes.float6_e3m2fn),
        (floating(4, 3, reserved=1), ml_dtypes.float8_e4m3fn),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_codes_of_floats_are_those_of_ml_dtypes(fmt: Format, theirs: type):
    all_codes = np.arange(2**fmt.bits, dtype=np.uint8).view(theirs).astype(np.float32)
    np.testing.assert_array_equal(list_code_values(fmt).numpy(), all_codes)
    np.testing.assert_array_equal(np.signbit(list_code_values(fmt).numpy()), np.signbit(all_codes))


def test_minus_zero_keeps_its_sign():
    assert encode_values(torch.tensor([0.0, -0.0]), list_code_values(floating(2, 1))).tolist() == [
        0,
        8,
    ]
    assert encode_values(torch.tensor([0.0, -0.0]), list_code_values(nf4)).tolist() == [7, 7]


def test_other_numbers_have_no_code():
    with pytest.raises(ValueError, match="no code"):
        encode_values(torch.tensor([0.7]), list_code_values(floating(2, 1)))


def test_a_format_of_more_than_8_bits_is_refused():
    with pytest.raises(UserError, match="at most 8 bits"):
        list_code_values(fp16)


@pytest.mark.parametrize(
    ("numbers", "expected", "size"),
    [
        ([0.0, 15, 3], UIntEncoding(4), 2),
        ([0.0, 200, 3], UIntEncoding(8), 3),
        ([2.0**-127, 2.0**127, 0.5], E8M0Encoding(False), 3),
        ([4 / 3 * 2.0**-20, 4 / 3, 4 / 3 * 2.0**9, 4 / 3, 4 / 3], E8M0Encoding(True), 9),
        ([0.1, 0.2002, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], FloatEncoding(4), 36),
        ([1.5, 0.3330078125, 2.0, 0.1, 0.25], None, None),
    ],
)
def test_smallest_encoding(numbers: list[float], expected, size):
    x = torch.tensor(numbers)
    encoding, parts = smallest_encoding(x, KIND.expand(len(x)), 1)
    assert encoding.decode(parts, KIND.expand(len(x))).equal(x)
    assert {name: len(part) for name, part in parts.items()} == encoding.part_sizes(len(x))
    if expected:
        assert (encoding, sum(map(len, parts.values()))) == (expected, size)


def test_the_factor_of_two_level_scales_is_found():
    codes = torch.tensor([448, 1, 3.5, 2.0**-9, 240, 18, *([448] * 20)])
    for factor in (0.001234, 3e-7, 17.0):
        x = codes * torch.tensor(factor)
        encoding, parts = smallest_encoding(x, KIND.expand(len(x)), 1)
        assert encoding == E4M3Encoding(1)
        assert encoding.decode(parts, KIND.expand(len(x))).equal(x)
        theirs = parts[""].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_allclose(theirs / theirs[0], codes.numpy() / 448, rtol=1e-6)


def round_weight(quantizer: Quantizer, weight: torch.Tensor) -> tuple[torch.Tensor, FakeQuantize]:
    grid = FakeQuantize(quantizer)
    grid.calibrate(weight)
    return grid(weight), grid


QUANTIZERS = {
    "e2m1 g16, fp16": Quantizer(floating(2, 1), PerGroup(16), AbsMax(fp16)),
    "e3m0 by row, fp32": Quantizer(floating(3, 0), PerChannel()),
    "e2m3 by tensor": Quantizer(floating(2, 3), PerTensor()),
    "int4 zero": Quantizer(integer(4, signed=False), PerGroup(16), MinMax(fp16)),
    "int8": Quantizer(integer(8), PerToken(), AbsMax(fp16)),
    "two-sided": Quantizer(floating(2, 1), PerGroup(16), TwoSidedAbsMax(fp16)),
    "offset": Quantizer(floating(2, 2, signed=False), PerChannel(), OffsetRange()),
    "nf4": Quantizer(nf4, PerGroup(16), AbsMax(fp16)),
    "mxfp4": Quantizer(floating(2, 1), PerGroup(32), E8M0Scale(floor_exponent)),
    "mxfp4 4/3": Quantizer(floating(2, 1), PerGroup(32), E8M0Scale(floor_exponent, 4 / 3)),
    "nvfp4": Quantizer(floating(2, 1), PerGroup(16), NVFP4Scale()),
    "shared by 3": Quantizer(SharedMantissa(floating(2, 3), 3), PerChannel(), AbsMax(fp16)),
    "shared by 4, short": Quantizer(
        SharedMantissa(floating(2, 2), 5, "short"), PerChannel(), AbsMax(fp16)
    ),
    "fp4 or int4": Quantizer(
        FormatSelection((floating(2, 1), integer(4)), LeastError(), "block"),
        PerGroup(16),
        NVFP4Scale(),
    ),
    "one of three": Quantizer(
        FormatSelection((floating(1, 2), floating(2, 1), floating(3, 0)), LeastError()),
        PerChannel(),
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_is_bit_exact(name: str, dtype: torch.dtype):
    quantizer = QUANTIZERS[name]
    torch.manual_seed(0)
    weight = (torch.randn(40, 96) * torch.rand(40, 1)).to(dtype)
    weight[3] = 0
    hard, grid = round_weight(quantizer, weight)
    layout, buffers = pack_weight(hard, grid)
    assert layout.dequantize(buffers, 96, layout.build_lookup_table()).to(dtype).equal(hard)
    assert {key: tuple(value.shape) for key, value in buffers.items()} == layout.buffer_shapes(
        40, 96
    )
    assert all(value.dtype == torch.uint8 for value in buffers.values())
    bytes_ = sum(value.numel() for value in buffers.values())
    assert (
        bytes_ - 8 <= quantizer.bits_per_value(weight.shape) * weight.numel() / 8 <= bytes_ + 8
        or name == "offset"
    )


# Scales and codes of `make_if4_weight()` by the code of IF4's authors: `quantize` of their
# PyTorch reference (github.com/mit-han-lab/fouroversix at dadfad6) with DataType.if4.
IF4_SCALES = "e1e4e5e67dea73f6e7e6e1e378797eeae3e5e7e7eb72f87b"
IF4_CODES = """
e9a3501cd6924f0bc5613efab4502de7a35f1cd6924e0bc5713df9b4602ce7a3380b96f0288db460000ad1300f07b120
0c95f0188db4600909d1300f07a1200dd5723efac4612df9a4601cd7935f0bc6723efab5612de9a4501cd7934f0bc672
188ec350098fd1480b97f1280da570198ec3500987d1380bf590100df360000ab4602ce7a35f1bd6924e0ac5613df9b4
501ce7a34f1cd6924e0ac5612df9b4500f06b0200ef470108eb460098fd2580a06b0100df370100cb360098fd2480a96
"""


def make_if4_weight() -> torch.Tensor:
    n = torch.arange(6 * 64)
    weight = (((n * 37 % 101 - 50).float() / 32) ** 3 * (1 + (n // 16) % 5)).view(6, 64)
    weight[::2] = weight[::2].sign() * weight[::2].abs() ** (1 / 3)
    return weight


def test_e2m1_or_int4_is_stored_as_if4():
    """The sign bit of a scale is that of the authors of IF4 (arXiv:2603.28765): 1 for INT4."""
    weight = make_if4_weight()
    hard, grid = round_weight(QUANTIZERS["fp4 or int4"], weight)
    _, buffers = pack_weight(hard, grid)
    assert bytes(buffers["scale"].tolist()).hex() == IF4_SCALES
    assert set(buffers) == {"codes", "scale", "scale_factor"}
    low_high = np.frombuffer(bytes.fromhex("".join(IF4_CODES.split())), np.uint8)
    theirs = np.stack([low_high & 15, low_high >> 4], -1).reshape(24, 16)
    scales = np.frombuffer(bytes.fromhex(IF4_SCALES), ml_dtypes.float8_e4m3fn).astype(np.float64)
    e2m1 = theirs.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    int4 = theirs.view(ml_dtypes.int4).astype(np.float64) * 6 / 7
    values = np.where(np.signbit(scales)[:, None], int4, e2m1)
    expected = values * np.abs(scales)[:, None] * float(weight.abs().max()) / (448 * 6)
    np.testing.assert_allclose(hard.view(24, 16).numpy(), expected, rtol=1e-6)


def test_formats_beside_their_scales_are_read():
    """Checkpoints from before the sign bit have an E4M3 encoding and a `format_index`."""
    hard, grid = round_weight(QUANTIZERS["fp4 or int4"], make_if4_weight())
    layout, buffers = pack_weight(hard, grid)
    older = Layout(layout.formats, layout.granularity, {"scale": E4M3Encoding(2)})
    index = torch.tensor(list(bytes.fromhex(IF4_SCALES)), dtype=torch.uint8) >> 7
    parts = {
        **buffers,
        "scale": buffers["scale"] & 127,
        "format_index": bitpack.pack_bits(index, 1),
    }
    assert {name: tuple(part.shape) for name, part in parts.items()} == older.buffer_shapes(6, 64)
    assert older.dequantize(parts, 64, older.build_lookup_table()).equal(hard)


def test_a_sign_bit_says_which_of_two_formats():
    with pytest.raises(ValueError, match="not of 3"):
        SignedE4M3Encoding(3)


@pytest.mark.parametrize("k", [1, 5, 9, 13])
def test_rows_of_odd_length(k: int):
    for fmt in (floating(2, 1), floating(2, 3), integer(3)):
        hard, grid = round_weight(Quantizer(fmt, PerChannel(), AbsMax(fp16)), torch.randn(7, k))
        layout, buffers = pack_weight(hard, grid)
        assert layout.dequantize(buffers, k, layout.build_lookup_table()).equal(hard)


def test_weights_off_the_grid_are_refused():
    hard, grid = round_weight(QUANTIZERS["e2m1 g16, fp16"], torch.randn(8, 32))
    hard[2, 3] += 1e-3
    with pytest.raises(UserError, match="does not lie on its grid"):
        pack_weight(hard, grid)


WEIGHTS = tiny.rules_for(QUANTIZERS["e2m1 g16, fp16"], per_channel_layers=["pos_embed.proj"])
DYNAMIC = [Rule("*", Quantizer(floating(3, 4), PerChannel()))]


def make_simulated_model(weights: list[Rule], activations: list[Rule]) -> nn.Module:
    torch.manual_seed(0)
    dit = transformer().eval()
    layers = apply.quantize_weights_(dit, rules.assign_rules(rules.find_layers(dit), weights))
    apply.quantize_activations_(dit, activations)
    for layer in layers.values():
        shape = (3, 4, 8, 8) if isinstance(layer, QuantConv) else (3, 4, layer.reduction_size)
        layer.prepare(torch.randn(shape) if layer.transforms else None)
        layer.commit_weight()
    return dit


@torch.no_grad()
def run_model(dit: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 7, 32, generator=generator).to(dtype)
    conditions = {"resolution": None, "aspect_ratio": None}
    inputs = {
        "timestep": torch.tensor([5, 700]),
        "added_cond_kwargs": conditions,
        "return_dict": False,
    }
    return dit(latent, encoder_hidden_states=text, **inputs)[0]


@pytest.mark.parametrize(
    "transforms",
    [(), (Hadamard(16),), (Smoothing(), LowRank(2))],
    ids=["none", "rotation", "branch"],
)
def test_packed_model_equals_the_simulated_one(no_kernels: None, transforms):
    """Include the convolution, whose patches are transformed."""
    dit = make_simulated_model(
        tiny.rules_for(QUANTIZERS["e2m1 g16, fp16"], transforms=transforms), DYNAMIC
    )
    before = run_model(dit)
    packed = pack_layers_(dit)
    assert len(packed) == 27
    assert run_model(dit).equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_casts_do_not_change_packed_weights(dtype: torch.dtype):
    static = Rule("*", Quantizer(integer(8), PerTensor()), observer=SampleObserver())
    dit = make_simulated_model(
        tiny.rules_for(QUANTIZERS["e2m1 g16, fp16"], transforms=(Smoothing(), LowRank(2))), [static]
    )
    for grid in (
        module for module in dit.modules() if isinstance(module, FakeQuantize) and module.static
    ):
        grid.calibrate(torch.randn(64))
    pack_layers_(dit)
    uncastable, before = uncastable_state_keys(dit), dit.state_dict()
    after = dit.to(dtype).state_dict()
    assert {"divisor", "down", "up", "scale", "codes"} <= {
        name.rpartition(".")[2] for name in uncastable
    }
    for name, value in before.items():
        assert after[name].equal(value if name in uncastable else value.to(dtype)), name
    assert run_model(dit, dtype).isfinite().all()


def test_the_weight_of_a_layer_is_a_placeholder():
    dit = make_simulated_model(WEIGHTS, DYNAMIC)
    pack_layers_(dit)
    layer = dit.get_submodule("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, PackedLinear)
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 32), torch.float32)
    assert layer.weight.isnan().all()
    with pytest.raises(RuntimeError):
        layer.weight.add_(1)


def test_refusals_name_the_layer():
    dit = make_simulated_model(WEIGHTS, [])
    dit.transformer_blocks[1].ff.net[2].source.weight.data += 0.01
    with pytest.raises(
        UserError, match=r"transformer_blocks\.1\.ff\.net\.2: the weight does not lie"
    ):
        pack_layers_(dit)


def test_byte_table_has_all_pairs_of_codes():
    codes = torch.tensor(list(itertools.product(range(16), range(16))), dtype=torch.uint8)
    values = list_code_values(floating(2, 1))[codes.int()]
    hard, grid = values, FakeQuantize(Quantizer(floating(2, 1), PerTensor()))
    grid.calibrate(values)
    layout, buffers = pack_weight(hard, grid)
    assert buffers["codes"].flatten().tolist() == [low | high << 4 for low, high in codes.tolist()]
    assert layout.dequantize(buffers, 2, layout.build_lookup_table()).equal(values)
