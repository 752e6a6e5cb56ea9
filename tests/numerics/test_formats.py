"""Number formats against independent implementations, code by code."""

from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit.numerics.codebook import Codebook
from fp4dit.numerics.formats import Format, NumberFormat, floating, fp16, integer, nf4

E2M1, E2M3, E3M2 = floating(2, 1), floating(2, 3), floating(3, 2)
E4M3, E5M2 = floating(4, 3, reserved=1), floating(5, 2, reserved=4)
FORMATS = [floating(3, 0), floating(1, 2), floating(3, 4), E2M1, E2M3, E3M2, E4M3, E5M2]
FORMATS += [integer(4), integer(8), integer(4, signed=False), integer(6, signed=False)]
FORMATS += [
    floating(2, 2, signed=False),
    floating(3, 1, signed=False),
    floating(4, 0, signed=False),
]
CODEBOOKS = [
    nf4,
    Codebook("lopsided", 3, (-8.0, -0.5, 0.0, 0.25, 1.0, 3.0)),
    Codebook("unsigned", 2, (0.0, 1.0, 5.0)),
]
CODEBOOKS += [Codebook("negative", 2, (-2.0, -1.0, 0.0))]

ML_DTYPES = [
    (E2M1, ml_dtypes.float4_e2m1fn, 16),
    (E2M3, ml_dtypes.float6_e2m3fn, 64),
    (E3M2, ml_dtypes.float6_e3m2fn, 64),
    (E4M3, ml_dtypes.float8_e4m3fn, 256),
    (E5M2, ml_dtypes.float8_e5m2, 256),
]
HALVES = (
    torch.arange(2**15 - 2**10, dtype=torch.int16).view(torch.float16).float()
)  # every finite code
HALVES = torch.cat([-HALVES[1:].flip(0), HALVES])
TORCH_DTYPES = [
    (E4M3, torch.float8_e4m3fn),
    (E5M2, torch.float8_e5m2),
    (fp16, torch.float16),
]


@cache
def values_of(fmt: Format) -> Tensor:
    return fmt.values()


def probes(fmt: Format) -> Tensor:
    """Every code, every midpoint, its fp32 neighbors, and random values of every size;
    none beyond the range.
    """
    codes = HALVES if fmt == fp16 else fmt.values()
    middle = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middle, torch.tensor(to)) for to in (float("inf"), float("-inf"))]
    random = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * fmt.max / 3
    small = random * torch.logspace(0, -6, len(random))
    return torch.cat([codes, middle, *near, random, small]).clamp(fmt.min, fmt.max)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fmt", "dtype", "codes"), ML_DTYPES, ids=lambda p: getattr(p, "name", None)
)
def test_equals_ml_dtypes_on_codes_midpoints_and_random_values(
    fmt: NumberFormat, dtype: type, codes: int
):
    table = np.arange(codes, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = torch.tensor(sorted(set(table[np.isfinite(table)].tolist())))  # a set, so that -0 is 0
    same(fmt.values(), finite)
    x = probes(fmt)
    same(fmt.nearest(x), torch.from_numpy(x.numpy().astype(dtype).astype(np.float32)))


@pytest.mark.parametrize(("fmt", "dtype"), TORCH_DTYPES, ids=lambda p: getattr(p, "name", None))
def test_equals_torch_casts(fmt: NumberFormat, dtype: torch.dtype):
    assert fmt.max == torch.finfo(dtype).max
    x = probes(fmt)
    same(fmt.nearest(x), x.to(dtype).float())


def test_bf16_equals_torch_cast():
    x = torch.randn(20_000) * torch.logspace(-30, 30, 20_000)
    same(floating(8, 7, reserved=2**7).nearest(x), x.to(torch.bfloat16).float())


def test_fp64_and_fp16_inputs_are_rounded_in_their_own_precision():
    x = torch.randn(5000, dtype=torch.float64)
    same(
        E4M3.nearest(x),
        torch.from_numpy(x.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)),
    )
    half = x.half()
    same(E2M1.nearest(half).float(), E2M1.nearest(half.float()))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_integers_equal_torch_fake_quantize(bits: int, signed: bool):
    fmt = integer(bits, signed)
    x = torch.cat(
        [torch.arange(-600, 600) / 4, torch.randn(5000) * fmt.max]
    )  # halves and quarters: ties too
    expected = torch.fake_quantize_per_tensor_affine(x, 1.0, 0, int(fmt.min), int(fmt.max))
    same(fmt.nearest(x), expected)
    assert len(fmt.values()) == (2**bits - 1 if signed else 2**bits)


@pytest.mark.parametrize(
    ("fmt", "magnitudes"),
    [
        (floating(3, 0), [0, 2**-6, 2**-5, 2**-4, 2**-3, 1 / 4, 1 / 2, 1]),
        (E2M1, [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]),
        (floating(1, 2), [k / 7 for k in range(8)]),
    ],
)
def test_published_grids_of_four_bits(fmt: NumberFormat, magnitudes: list[float]):
    expected = torch.tensor([-m for m in reversed(magnitudes[1:])] + magnitudes)
    torch.testing.assert_close(fmt.values() / fmt.max, expected)


@pytest.mark.parametrize(
    ("fmt", "magnitudes", "largest_to_smallest"),
    [(E2M3, 32, 60), (E3M2, 32, 448), (floating(3, 4), 128, 1984)],
)
def test_published_grids_of_six_and_eight_bits(
    fmt: NumberFormat, magnitudes: int, largest_to_smallest: float
):
    assert (fmt.values() >= 0).sum() == magnitudes
    assert fmt.max / fmt.smallest == largest_to_smallest
    assert fmt.values()[magnitudes] == fmt.smallest


@pytest.mark.parametrize(
    "exponent_mantissa", [(3, 0), (2, 1), (1, 2), (2, 2), (2, 3), (3, 2), (4, 1), (4, 3), (5, 2)]
)
def test_equals_the_published_formula_with_its_real_valued_bias(exponent_mantissa: tuple[int, int]):
    """Section 1 of the method: the clip value is absorbed in the bias; ours has a scale instead."""
    (exponent, mantissa), a = exponent_mantissa, 0.37
    fmt = floating(exponent, mantissa)
    bias = 2**exponent - 1 - np.log2(a) + np.log2(2 - 2.0**-mantissa)
    x = torch.randn(5000, dtype=torch.float64) * a / 2
    p = (x.clamp(-a, a).abs().log2() + bias).floor().clamp(min=1)
    step = 2 ** (p - mantissa - bias)
    expected = step * (x.clamp(-a, a) / step).round()
    scale = a / fmt.max
    torch.testing.assert_close(fmt.nearest(x / scale) * scale, expected)


def test_ties_of_e2m1_fall_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        same(E2M1.nearest(ties.to(dtype)), even.to(dtype))
        same(E2M1.nearest(-ties.to(dtype)), -even.to(dtype))


@pytest.mark.parametrize(
    "fmt", [*FORMATS, fp16, floating(8, 7, reserved=2**7)], ids=lambda f: f"{f.name}_{f.max:g}"
)
def test_nearest_has_every_bit_of_the_textbook_formula(fmt: NumberFormat):
    """Each exponent of fp32, subnormals and both zeros too, and the other types,
    against frexp and ldexp.
    """

    def textbook(x: Tensor) -> Tensor:
        x = x.clamp(fmt.min, fmt.max)
        exponent = torch.frexp(x.abs().clamp(min=2.0**fmt.min_exponent)).exponent - 1
        step = torch.ldexp(torch.ones_like(x), exponent - fmt.mantissa)
        return torch.copysign((x.abs() / step).round() * step, x)

    def agree(x: Tensor, bits: torch.dtype) -> None:
        x = torch.cat([x, -x])
        assert torch.equal(fmt.nearest(x).view(bits), textbook(x).view(bits))

    fraction = torch.randint(
        2**23, (255, 40), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    fraction[:, :3] = torch.tensor([0, 2**22, 2**23 - 1])
    x = (
        ((torch.arange(255, dtype=torch.int32) << 23)[:, None] + fraction)
        .view(torch.float32)
        .flatten()
    )
    agree(x, torch.int32)
    if fmt.bits <= 8 or fmt == fp16:  # else there are too many codes to list
        agree(probes(fmt), torch.int32)
    agree(x.double() * (1 + 2**-40), torch.int64)
    agree(x.bfloat16()[x.bfloat16().isfinite()], torch.int16)
    if fmt.min_exponent >= -14:  # else fp16 does not hold its binades
        agree(x[(x < 65000) & (x > 2**-24)].half(), torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fmt", [fmt for fmt in FORMATS if fmt.bits <= 8], ids=lambda f: f.name)
def test_in_place_it_is_the_same_but_for_the_sign_of_zeros(fmt: NumberFormat, dtype: torch.dtype):
    x = probes(fmt).to(dtype)
    expected = fmt.nearest(x)
    same(fmt.nearest_(x) + 0.0, expected + 0.0)
    assert x.equal(expected)
    assert fmt.nearest_(torch.full((1,), torch.nan, dtype=dtype)).isnan()


def test_nearest_has_no_gradient_and_keeps_its_input():
    x = torch.randn(100, requires_grad=True)
    before = x.detach().clone()
    (E2M1.nearest(x) + x).sum().backward()
    assert x.grad is not None
    same(x.grad, torch.ones(100))
    same(x.detach(), before)


def test_an_unsigned_float_is_the_upper_half_of_the_signed_one():
    for exponent, mantissa in [(2, 2), (3, 1), (4, 0), (4, 3)]:
        signed, unsigned = floating(exponent, mantissa), floating(exponent, mantissa, signed=False)
        assert unsigned.name == f"ue{exponent}m{mantissa}"
        assert unsigned.bits == exponent + mantissa == signed.bits - 1
        same(unsigned.values(), signed.values()[signed.values() >= 0])
        x = torch.randn(2000) * signed.max / 2
        same(unsigned.nearest(x), signed.nearest(x).clamp(min=0))


def test_nf4_is_the_published_list():
    """Compare with the fp32 numbers of arXiv:2305.14314 that bitsandbytes tabulates."""
    negative = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453]
    negative += [-0.28444138169288635, -0.18477343022823334, -0.09105003625154495]
    positive = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    positive += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
    same(nf4.values(), torch.tensor([*negative, 0.0, *positive]))
    assert nf4.bits == 4


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_codebooks_round_to_nearest_with_ties_towards_zero(fmt: Codebook, dtype: torch.dtype):
    levels = fmt.values().to(dtype)
    x = torch.cat([probes(fmt), torch.tensor([-100.0, 100.0])]).to(dtype)
    by_size = levels[levels.abs().argsort(stable=True)].double()  # argmin takes the first of equals
    nearest = by_size[(x.double()[:, None] - by_size).abs().argmin(1)]
    same(fmt.nearest(x), nearest.to(dtype))
    ties = (levels[1:].double() + levels[:-1].double()) / 2
    ends = torch.minimum(levels[1:].abs(), levels[:-1].abs()).double()
    if dtype == torch.float64:
        same(fmt.nearest(ties).abs(), ends)


@pytest.mark.parametrize("fmt", CODEBOOKS, ids=lambda f: f.name)
def test_steps_of_codebooks_lead_outwards_and_never_vanish(fmt: Codebook):
    x = probes(fmt)
    inner, outer = fmt.bracket(x)
    inside = inner != outer
    same(fmt.step(x)[inside], (outer - inner).abs()[inside])
    gaps = fmt.values().diff()
    at_ends = fmt.step(torch.tensor([fmt.min - 1, fmt.max, fmt.max + 1, float("inf")]))
    same(at_ends, gaps[[0, -1, -1, -1]])


def test_a_codebook_of_a_floats_values_differs_only_at_ties():
    book = Codebook("e2m1", 4, tuple(E2M1.values().tolist()))
    x = torch.randn(5000) * 3
    same(book.nearest(x), E2M1.nearest(x))
    for ours, theirs in zip(book.bracket(x), E2M1.bracket(x), strict=True):
        same(ours, theirs)
    inside = x.clamp(-5.9, 5.9)
    same(book.step(inside), E2M1.step(inside))


@pytest.mark.parametrize(
    "levels", [(0.0,), (1.0, 2.0), (0.0, 0.0, 1.0), (1.0, 0.0), (-2.0, -1.0, 0.0, 1.0, 2.0)]
)
def test_what_is_no_codebook_of_two_bits_is_an_error(levels: tuple[float, ...]):
    with pytest.raises(ValueError, match=r"2 to 2\^2 values in ascending order, 0 among them"):
        Codebook("bad", 2, levels)


def test_e1m2_is_symmetric_int4_in_disguise():
    same(2 * floating(1, 2).values(), integer(4).values())


def test_formats_that_are_subsets_of_fp8_up_to_a_power_of_two():
    hardware = set(E4M3.values().tolist())

    def fits(fmt: NumberFormat) -> bool:
        return any(
            set((fmt.values() * 2.0**shift).tolist()) <= hardware for shift in range(-12, 12)
        )

    assert all(fits(fmt) for fmt in (E2M1, E2M3, E3M2, floating(1, 2), floating(3, 0)))
    assert not fits(floating(3, 4))


@pytest.mark.parametrize("fmt", [*FORMATS, *CODEBOOKS], ids=lambda f: f"{f.name}_{f.max:g}")
class TestEveryFormat:
    @settings(max_examples=30)
    @given(
        x=st.lists(
            st.floats(-1e5, 1e5, width=32) | st.floats(-8, 8, width=32), min_size=1, max_size=50
        )
    )
    def test_nearest_lands_on_values_in_order_and_stays(self, fmt: Format, x: list[float]):
        ascending, values = torch.tensor(sorted(x)), values_of(fmt)
        once = fmt.nearest(ascending)
        assert torch.isin(once, values).all()
        assert torch.equal(fmt.nearest(once), once)
        assert (once.diff() >= 0).all()
        if torch.equal(values, -values.flip(0)):
            assert torch.equal(fmt.nearest(-ascending), -once)

    def test_is_a_format_on_every_device(self, fmt: Format):
        assert isinstance(fmt, Format)
        x = torch.empty(3, device="meta")
        for result in (fmt.nearest(x), fmt.step(x), *fmt.bracket(x)):
            assert (result.device, result.shape) == (x.device, x.shape)

    @settings(max_examples=50)
    @given(x=st.floats(-1e5, 1e5, width=32))
    def test_bracket_encloses_and_nearest_is_its_nearer_end(self, fmt: Format, x: float):
        t = torch.tensor([x])
        clipped = t.clamp(fmt.min, fmt.max)
        inner, outer = fmt.bracket(t)
        assert inner.abs() <= clipped.abs() <= outer.abs()
        assert fmt.min <= outer <= fmt.max
        assert fmt.nearest(t).item() in (inner.item(), outer.item())
        assert (fmt.nearest(t) - clipped).abs() == torch.minimum(
            (inner - clipped).abs(), (outer - clipped).abs()
        )

    def test_bracket_ends_are_neighbors_on_the_grid(self, fmt: Format):
        values = fmt.values()
        inner, outer = fmt.bracket(probes(fmt))
        here, there = torch.searchsorted(values, inner), torch.searchsorted(values, outer)
        same(values[here], inner)
        same(values[there], outer)
        assert (here - there).abs().max() == 1
        assert (inner == outer).logical_and(inner.abs() < fmt.max).sum() == 0

    def test_nearest_is_a_projection(self, fmt: Format):
        same(fmt.nearest(fmt.values()), fmt.values())

    def test_saturates_and_keeps_nan(self, fmt: Format):
        x = torch.tensor([float("inf"), float("-inf"), 1e30, -1e30, float("nan")])
        same(fmt.nearest(x)[:4], torch.tensor([fmt.max, fmt.min, fmt.max, fmt.min]))
        assert fmt.nearest(x)[4].isnan()
        assert fmt.bracket(x)[0][4].isnan()

    @pytest.mark.parametrize("zero", [0.0, -0.0])
    def test_bracket_of_zero_stays_in_range(self, fmt: Format, zero: float):
        inner, outer = fmt.bracket(torch.tensor([zero]))
        assert inner == 0
        assert fmt.min <= outer <= fmt.max
        outwards = fmt.values()[fmt.values() > 0] if fmt.max > 0 else torch.zeros(1)
        assert outer.abs() == outwards.min()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.name}_{f.max:g}")
def test_bits_count_the_codes(fmt: NumberFormat):
    codes = len(fmt.values()) + (
        fmt.min < 0
    )  # -0 is a code of floats; signed integers leave one unused
    reserved = {"e4m3fn": 2, "e5m2ieee": 8}.get(fmt.name, 0)
    assert codes + reserved == 2**fmt.bits


@pytest.mark.parametrize("mantissa", [0, 2, 3])
def test_no_exponent_is_an_error_that_names_the_alternative(mantissa: int):
    with pytest.raises(ValueError, match=rf"E0M{mantissa}.*1 to 8 exponent bits.*integer\(bits="):
        floating(0, mantissa)


def test_an_integer_of_one_bit_is_an_error():
    with pytest.raises(ValueError, match="at least 2 bits"):
        integer(1)


@pytest.mark.parametrize("fmt", [integer(2), integer(4, signed=False), integer(8)])
def test_integers_round_as_torch_does(fmt: NumberFormat):
    x = torch.cat([torch.linspace(fmt.min - 2, fmt.max + 2, 4001), torch.arange(-9, 9) / 2])
    assert fmt.is_integer
    assert torch.equal(fmt.nearest(x), x.clamp(fmt.min, fmt.max).round())


@pytest.mark.parametrize("fmt", [floating(2, 1), floating(1, 2), floating(5, 2)])
def test_floats_are_no_integers(fmt: NumberFormat):
    assert not fmt.is_integer
