"""Tokens quantized in few passes: the same as the quantizer makes of them, whatever they are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4dit.blockscales import E4M3
from fp4dit.formats import floating, integer
from fp4dit.grid import Grid
from fp4dit.packed.tokens import PART, quantized, token_format
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinMax

FORMATS = [*(floating(e, m) for e in range(1, 8) for m in range(7) if e + m < 8), integer(4), integer(8), E4M3]
NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def tokens(fmt) -> Quantizer:
    return Quantizer(fmt, Granularity("row"))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=math.pi), b.nan_to_num(nan=math.pi))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_tokens(fmt, dtype: torch.dtype):
    x = torch.randn(3, 67, 48).mul(torch.randn(3, 67, 1).mul(6).exp()).to(dtype)
    x[0, 0] = 0
    assert token_format(Grid(tokens(fmt))) == fmt
    assert quantized(x, fmt).dtype == dtype
    assert same(quantized(x, fmt), tokens(fmt)(x))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_value_and_every_tie_between_two(fmt):
    values = fmt.values()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2])[None]
    for scale in (1.0, 0.37, 2.0**-120):
        assert quantized(x * scale, fmt).equal(tokens(fmt)(x * scale))


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.sampled_from(FORMATS))
def test_any_numbers(row: list[float], fmt):
    x = torch.tensor([row])
    assert same(quantized(x, fmt), tokens(fmt)(x))


def test_rows_longer_than_a_part_and_none_at_all():
    for shape in [(3, PART + 1), (0, 8), (2, 0, 8)]:
        x = torch.randn(shape)
        assert quantized(x, E4M3).equal(tokens(E4M3)(x))


@pytest.mark.parametrize(
    "other",
    [
        Quantizer(E4M3, Granularity("group", 16)),
        Quantizer(E4M3, Granularity("row"), AbsMax(E4M3)),
        Quantizer(integer(8, signed=False), Granularity("row"), MinMax()),
        tokens(floating(3, 4, signed=False)),
        tokens(floating(5, 10)),
    ],
)
def test_what_else_an_activation_may_do_is_left_to_its_quantizer(other: Quantizer):
    assert token_format(Grid(other)) is None
    assert token_format(Grid(tokens(E4M3), static=True)) is None
