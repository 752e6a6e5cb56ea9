"""The fast quantization of tokens is bit-exact with `Quantizer`."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import floating, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.nn.token_quant import TOKEN_CHUNK_VALUES, fast_token_format, quantize_tokens
from fp4dit.quantization.fake_quant import FakeQuantize

FORMATS = [
    *(floating(e, m) for e in range(1, 8) for m in range(7) if e + m < 8),
    integer(4),
    integer(8),
    E4M3,
]
NUMBERS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def make_token_quantizer(fmt) -> Quantizer:
    return Quantizer(fmt, PerChannel())


def equal_with_nans(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.nan_to_num(nan=math.pi), b.nan_to_num(nan=math.pi))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_random_tokens(fmt, dtype: torch.dtype):
    x = torch.randn(3, 67, 48).mul(torch.randn(3, 67, 1).mul(6).exp()).to(dtype)
    x[0, 0] = 0
    assert fast_token_format(FakeQuantize(make_token_quantizer(fmt))) == fmt
    assert quantize_tokens(x, fmt).dtype == dtype
    assert equal_with_nans(quantize_tokens(x, fmt), make_token_quantizer(fmt)(x))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_every_value_and_every_tie(fmt):
    values = fmt.values()
    x = torch.cat([values, (values[1:] + values[:-1]) / 2])[None]
    for scale in (1.0, 0.37, 2.0**-120):
        assert quantize_tokens(x * scale, fmt).equal(make_token_quantizer(fmt)(x * scale))


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.sampled_from(FORMATS))
def test_any_numbers(row: list[float], fmt):
    x = torch.tensor([row])
    assert equal_with_nans(quantize_tokens(x, fmt), make_token_quantizer(fmt)(x))


def test_long_rows_and_empty_inputs():
    for shape in [(3, TOKEN_CHUNK_VALUES + 1), (0, 8), (2, 0, 8)]:
        x = torch.randn(shape)
        assert quantize_tokens(x, E4M3).equal(make_token_quantizer(E4M3)(x))


@pytest.mark.parametrize(
    "other",
    [
        Quantizer(E4M3, PerGroup(16)),
        Quantizer(E4M3, PerChannel(), AbsMax(E4M3)),
        Quantizer(integer(8, signed=False), PerChannel(), MinMax()),
        make_token_quantizer(floating(3, 4, signed=False)),
        make_token_quantizer(floating(5, 10)),
    ],
)
def test_other_quantizers_have_no_fast_format(other: Quantizer):
    assert fast_token_format(FakeQuantize(other)) is None
    assert fast_token_format(FakeQuantize(make_token_quantizer(E4M3), static=True)) is None
