"""Packed weights: bits, codes, scales, and layers that give what was simulated."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fp4dit import policy
from fp4dit.ams import SharedMantissa
from fp4dit.blockscales import E8M0, NVFP4, floor
from fp4dit.choice import Choice, LeastError
from fp4dit.errors import UserError
from fp4dit.formats import Format, floating, fp16, integer, nf4
from fp4dit.grid import Grid
from fp4dit.hadamard import Hadamard
from fp4dit.layer import QuantConv
from fp4dit.observers import Sample
from fp4dit.packed import bits
from fp4dit.packed.codes import encode, levels
from fp4dit.packed.description import verbatim
from fp4dit.packed.layer import PackedLinear, pack_
from fp4dit.packed.layout import pack
from fp4dit.packed.numbers import Eighths, Floats, Powers, Whole, smallest
from fp4dit.policy import Rule, everywhere
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.transforms import Balance, LowRank
from tests.tiny import transformer

FORMATS: list[Format] = [
    *(floating(e, m, signed=s) for e in range(1, 6) for m in range(5) for s in (True, False) if 2 <= e + m + s <= 8),
    *(integer(n, signed=s) for n in range(2, 9) for s in (True, False)),
    floating(4, 3, reserved=1),
    nf4,
]
KIND = torch.zeros(1, dtype=torch.uint8)


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=40))))
def test_bits_are_those_of_a_binary_number_from_its_lowest_one(drawn):
    width, numbers = drawn
    row = torch.tensor([numbers], dtype=torch.uint8)
    packed = bits.pack(row, width)
    whole = sum(number << width * i for i, number in enumerate(numbers))
    assert bytes(packed[0].tolist()) == whole.to_bytes(bits.size(len(numbers), width), "little")
    assert bits.unpack(packed, width, len(numbers)).equal(row)


def test_the_first_of_two_codes_is_the_low_half_of_the_byte():
    assert bits.pack(torch.tensor([1, 2], dtype=torch.uint8), 4).tolist() == [0x21]


def test_a_number_of_too_many_bits_is_refused():
    with pytest.raises(ValueError, match="do not have 4 bits"):
        bits.pack(torch.tensor([16], dtype=torch.uint8), 4)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_value_has_a_code_of_its_own(fmt: Format):
    codes = encode(fmt.values(), levels(fmt))
    assert len(codes.unique()) == len(fmt.values())
    assert int(codes.max()) < 2**fmt.bits
    assert levels(fmt)[codes.int()].equal(fmt.values())


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
def test_codes_of_floats_are_their_usual_bits(fmt: Format, theirs: type):
    all_codes = np.arange(2**fmt.bits, dtype=np.uint8).view(theirs).astype(np.float32)
    np.testing.assert_array_equal(levels(fmt).numpy(), all_codes)
    np.testing.assert_array_equal(np.signbit(levels(fmt).numpy()), np.signbit(all_codes))


def test_minus_zero_keeps_its_sign():
    assert encode(torch.tensor([0.0, -0.0]), levels(floating(2, 1))).tolist() == [0, 8]
    assert encode(torch.tensor([0.0, -0.0]), levels(nf4)).tolist() == [7, 7]


def test_what_is_no_value_has_no_code():
    with pytest.raises(ValueError, match="no code"):
        encode(torch.tensor([0.7]), levels(floating(2, 1)))


def test_a_format_of_more_than_8_bits_is_refused():
    with pytest.raises(UserError, match="at most 8 bits"):
        levels(fp16)


@pytest.mark.parametrize(
    ("numbers", "way", "size"),
    [
        ([0.0, 15, 3], Whole(4), 2),
        ([0.0, 200, 3], Whole(8), 3),
        ([2.0**-127, 2.0**127, 0.5], Powers(False), 3),
        ([4 / 3 * 2.0**-20, 4 / 3, 4 / 3 * 2.0**9, 4 / 3, 4 / 3], Powers(True), 9),
        ([0.1, 0.2002, 0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], Floats(4), 36),
        ([1.5, 0.3330078125, 2.0, 0.1, 0.25], None, None),
    ],
)
def test_numbers_are_kept_in_the_fewest_bytes_that_hold_them(numbers: list[float], way, size):
    x = torch.tensor(numbers)
    found, parts = smallest(x, KIND.expand(len(x)), 1)
    assert found.decode(parts, KIND.expand(len(x))).equal(x)
    assert {name: len(part) for name, part in parts.items()} == found.sizes(len(x))
    if way:
        assert (found, sum(map(len, parts.values()))) == (way, size)


def test_scales_of_two_levels_are_taken_apart_without_knowing_the_factor():
    codes = torch.tensor([448, 1, 3.5, 2.0**-9, 240, 18, *([448] * 20)])
    for factor in (0.001234, 3e-7, 17.0):
        x = codes * torch.tensor(factor)
        found, parts = smallest(x, KIND.expand(len(x)), 1)
        assert found == Eighths(1)
        assert found.decode(parts, KIND.expand(len(x))).equal(x)
        theirs = parts[""].numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        np.testing.assert_allclose(theirs / theirs[0], codes.numpy() / 448, rtol=1e-6)


def rounded(quantizer: Quantizer, weight: torch.Tensor) -> tuple[torch.Tensor, Grid]:
    grid = Grid(quantizer)
    grid.measure(weight)
    return grid(weight), grid


QUANTIZERS = {
    "e2m1 g16, fp16": Quantizer(floating(2, 1), Granularity("group", 16), AbsMax(fp16)),
    "e3m0 by row, fp32": Quantizer(floating(3, 0), Granularity("row")),
    "e2m3 by tensor": Quantizer(floating(2, 3), Granularity("tensor")),
    "int4 zero": Quantizer(integer(4, signed=False), Granularity("group", 16), MinMax(fp16)),
    "int8": Quantizer(integer(8), Granularity("row"), AbsMax(fp16)),
    "two-sided": Quantizer(floating(2, 1), Granularity("group", 16), TwoSidedAbsMax(fp16)),
    "offset": Quantizer(floating(2, 2, signed=False), Granularity("row"), OffsetRange()),
    "nf4": Quantizer(nf4, Granularity("group", 16), AbsMax(fp16)),
    "mxfp4": Quantizer(floating(2, 1), Granularity("group", 32), E8M0(floor)),
    "mxfp4 4/3": Quantizer(floating(2, 1), Granularity("group", 32), E8M0(floor, 4 / 3)),
    "nvfp4": Quantizer(floating(2, 1), Granularity("group", 16), NVFP4()),
    "shared by 3": Quantizer(SharedMantissa(floating(2, 3), 3), Granularity("row"), AbsMax(fp16)),
    "shared by 4, short": Quantizer(SharedMantissa(floating(2, 2), 5, "short"), Granularity("row"), AbsMax(fp16)),
    "fp4 or int4": Quantizer(
        Choice((floating(2, 1), integer(4)), LeastError(), "block"), Granularity("group", 16), NVFP4()
    ),
    "one of three": Quantizer(
        Choice((floating(1, 2), floating(2, 1), floating(3, 0)), LeastError()), Granularity("row")
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_weight_is_read_as_it_was_packed(name: str, dtype: torch.dtype):
    quantizer = QUANTIZERS[name]
    torch.manual_seed(0)
    weight = (torch.randn(40, 96) * torch.rand(40, 1)).to(dtype)
    weight[3] = 0
    hard, grid = rounded(quantizer, weight)
    layout, held = pack(hard, grid)
    assert layout.weight(held, 96, layout.table()).to(dtype).equal(hard)
    assert {key: tuple(value.shape) for key, value in held.items()} == layout.sizes(40, 96)
    assert all(value.dtype == torch.uint8 for value in held.values())
    bytes_ = sum(value.numel() for value in held.values())
    assert bytes_ - 8 <= quantizer.bits(weight.shape) * weight.numel() / 8 <= bytes_ + 8 or name == "offset"


@pytest.mark.parametrize("k", [1, 5, 9, 13])
def test_rows_of_odd_length(k: int):
    for fmt in (floating(2, 1), floating(2, 3), integer(3)):
        hard, grid = rounded(Quantizer(fmt, Granularity("row"), AbsMax(fp16)), torch.randn(7, k))
        layout, held = pack(hard, grid)
        assert layout.weight(held, k, layout.table()).equal(hard)


def test_a_weight_off_its_grid_is_refused():
    hard, grid = rounded(QUANTIZERS["e2m1 g16, fp16"], torch.randn(8, 32))
    hard[2, 3] += 1e-3
    with pytest.raises(UserError, match="does not lie on its grid"):
        pack(hard, grid)


WEIGHTS = everywhere(QUANTIZERS["e2m1 g16, fp16"], by_row=["pos_embed.proj"])
ONLINE = [Rule("*", Quantizer(floating(3, 4), Granularity("row")))]


def simulated(weights: list[Rule], activations: list[Rule]) -> nn.Module:
    torch.manual_seed(0)
    dit = transformer().eval()
    layers = policy.quantize_weights_(dit, policy.assign(policy.layers(dit), weights))
    policy.quantize_activations_(dit, activations)
    for layer in layers.values():
        shape = (3, 4, 8, 8) if isinstance(layer, QuantConv) else (3, 4, layer.width)
        layer.prepare(torch.randn(shape) if layer.transforms else None)
        layer.freeze()
    return dit


@torch.no_grad()
def answer(dit: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 8, 8, generator=generator).to(dtype)
    text = torch.randn(2, 7, 32, generator=generator).to(dtype)
    conditions = {"resolution": None, "aspect_ratio": None}
    given = {"timestep": torch.tensor([5, 700]), "added_cond_kwargs": conditions, "return_dict": False}
    return dit(latent, encoder_hidden_states=text, **given)[0]


@pytest.mark.parametrize(
    "transforms", [(), (Hadamard(16),), (Balance(), LowRank(2))], ids=["none", "rotation", "branch"]
)
def test_a_packed_model_answers_as_the_simulated_one(transforms):
    """Also of the convolution, whose patches the transforms are for."""
    dit = simulated(everywhere(QUANTIZERS["e2m1 g16, fp16"], transforms=transforms), ONLINE)
    before = answer(dit)
    made = pack_(dit)
    assert len(made) == 27
    assert answer(dit).equal(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cast_rounds_nothing_that_was_saved_once_more(dtype: torch.dtype):
    static = Rule("*", Quantizer(integer(8), Granularity("tensor")), observe=Sample())
    dit = simulated(everywhere(QUANTIZERS["e2m1 g16, fp16"], transforms=(Balance(), LowRank(2))), [static])
    for grid in (module for module in dit.modules() if isinstance(module, Grid) and module.static):
        grid.measure(torch.randn(64))
    pack_(dit)
    kept, before = verbatim(dit), dit.state_dict()
    after = dit.to(dtype).state_dict()
    assert {"divisor", "down", "up", "scale", "codes"} <= {name.rpartition(".")[2] for name in kept}
    for name, value in before.items():
        assert after[name].equal(value if name in kept else value.to(dtype)), name
    assert answer(dit, dtype).isfinite().all()


def test_a_layer_stands_in_for_its_weight_but_cannot_be_written():
    dit = simulated(WEIGHTS, ONLINE)
    pack_(dit)
    layer = dit.get_submodule("transformer_blocks.0.attn1.to_q")
    assert isinstance(layer, PackedLinear)
    assert (layer.weight.shape, layer.weight.dtype) == ((32, 32), torch.float32)
    assert layer.weight.isnan().all()
    with pytest.raises(RuntimeError):
        layer.weight.add_(1)


def test_what_cannot_be_packed_is_named():
    dit = simulated(WEIGHTS, [])
    dit.transformer_blocks[1].ff.net[2].source.weight.data += 0.01
    with pytest.raises(UserError, match=r"transformer_blocks\.1\.ff\.net\.2: the weight does not lie"):
        pack_(dit)


def test_a_large_table_of_all_pairs_of_codes():
    codes = torch.tensor(list(itertools.product(range(16), range(16))), dtype=torch.uint8)
    values = levels(floating(2, 1))[codes.int()]
    hard, grid = values, Grid(Quantizer(floating(2, 1), Granularity("tensor")))
    grid.measure(values)
    layout, held = pack(hard, grid)
    assert held["codes"].flatten().tolist() == [low | high << 4 for low, high in codes.tolist()]
    assert layout.weight(held, 2, layout.table()).equal(values)
