"""A mantissa bit shared by neighbors."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit.numerics.formats import Format, NumberFormat, floating, integer
from fp4dit.numerics.quantizer import PerChannel, Quantizer
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.utils.errors import UserError

E2M3, E2M2 = floating(2, 3), floating(2, 2)
FORMATS = [SharedMantissa(E2M3, 3), SharedMantissa(E2M2, 4), SharedMantissa(floating(3, 1), 2)]
FORMATS += [SharedMantissa(floating(2, 2, signed=False), 3), SharedMantissa(integer(4), 2)]


def last_bits(x: Tensor, fmt: SharedMantissa) -> Tensor:
    """The last bit of each value's code, counted from zero."""
    magnitudes = fmt.values()[fmt.values() >= 0]
    code = torch.searchsorted(magnitudes, x.abs())
    assert torch.equal(magnitudes[code], x.abs())
    return code % 2


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
class TestEverySharing:
    @settings(max_examples=40)
    @given(seed=st.integers(0, 10**6), size=st.floats(0.01, 10))
    def test_a_group_has_one_last_bit_and_stays_as_it_is(
        self, fmt: SharedMantissa, seed: int, size: float
    ):
        x = torch.randn(5, 4 * fmt.share, generator=torch.Generator().manual_seed(seed)) * size
        once = fmt.nearest(x)
        bits = last_bits(once, fmt).unflatten(-1, (-1, fmt.share))
        assert (bits == bits[..., :1]).all()
        assert torch.equal(fmt.nearest(once), once)
        assert torch.isin(once, fmt.values()).all()
        if fmt.min < 0:
            assert torch.equal(fmt.nearest(-x), -once)

    def test_no_member_of_the_grid_is_nearer_in_total(self, fmt: SharedMantissa):
        """Against every combination of values with one last bit."""
        fmt = SharedMantissa(fmt.base, 2)
        values = fmt.values()
        pairs = torch.tensor(list(itertools.product(values.tolist(), repeat=2)))
        bits = last_bits(pairs, fmt)
        allowed = pairs[bits[:, 0] == bits[:, 1]]
        x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) * fmt.max / 2
        x = x.clamp(fmt.min, fmt.max)
        least = (x[:, None] - allowed).square().sum(-1).amin(1)
        torch.testing.assert_close((fmt.nearest(x) - x).square().sum(-1), least)

    def test_saturates_and_keeps_nan(self, fmt: SharedMantissa):
        x = torch.tensor([float("inf"), 1e30, -1e30, float("-inf")])[:, None].expand(-1, fmt.share)
        ends = torch.tensor([fmt.max, fmt.max, fmt.min, fmt.min])[:, None].expand(-1, fmt.share)
        assert torch.equal(fmt.nearest(x), ends)
        assert fmt.nearest(torch.full((fmt.share,), torch.nan)).isnan().all()

    def test_is_a_format_of_any_shape_type_and_device(self, fmt: SharedMantissa):
        assert isinstance(fmt, Format)
        x = torch.randn(2, 3, 12)
        whole = fmt.nearest(x)
        assert torch.equal(whole[1, 2], fmt.nearest(x[1, 2]))
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            assert torch.equal(fmt.nearest(whole.to(dtype)), whole.to(dtype))
        assert fmt.nearest(x.to("meta")).shape == x.shape
        assert (fmt.step(whole) > 0).all()


@pytest.mark.parametrize(
    ("base", "share", "bits"), [(E2M3, 3, 5 + 1 / 3), (E2M2, 4, 4.25), (E2M2, 1, 5)]
)
def test_bits_per_value(base: NumberFormat, share: int, bits: float):
    assert SharedMantissa(base, share).bits == bits
    quantizer = Quantizer(SharedMantissa(base, share), PerChannel())
    assert quantizer.bits_per_value(torch.Size([4, 240])) == bits + 32 / 240


def test_a_value_that_shares_with_nobody_is_rounded_to_nearest():
    x = torch.randn(4000) * 4
    assert torch.equal(SharedMantissa(E2M3, 1).nearest(x), E2M3.nearest(x))


def test_ties_between_bits_and_within_one_bit():
    """A tie between bits falls to bit 0, and a tie within one bit towards zero."""
    fmt = SharedMantissa(integer(4), 2)  # even numbers or odd ones
    x = torch.tensor([[2.5, 4.5], [1.0, 2.0], [1.0, 1.0], [3.0, 2.9]])
    assert fmt.nearest(x).tolist() == [[2, 4], [0, 2], [1, 1], [3, 3]]


@pytest.mark.parametrize(
    ("base", "share", "error"),
    [
        (E2M3, 1, 0.00079),
        (E2M3, 3, 0.00148),
        (E2M2, 1, 0.0032),
        (E2M2, 2, 0.0052),
        (E2M2, 4, 0.0068),
        (E2M2, 8, 0.0081),
    ],
)
def test_error_on_gaussian_channels(base: NumberFormat, share: int, error: float):
    """Relative squared errors of channels of 1152 values,
    computed independently with NumPy for the design notes.
    """
    x = torch.randn(500, 1152, generator=torch.Generator().manual_seed(0))
    y = Quantizer(SharedMantissa(base, share), PerChannel())(x)
    assert ((y - x).square().sum() / x.square().sum()).item() == pytest.approx(error, rel=0.02)


def test_groups_that_do_not_divide_a_row():
    """They are an error unless the last group may be short."""
    x = torch.randn(7, 256)
    with pytest.raises(
        ValueError, match=r"groups of 3 values do not divide a row or block of 256.*tail: short"
    ):
        SharedMantissa(E2M3, 3, tail="error").nearest(x)
    short = SharedMantissa(E2M3, 3)
    y = short.nearest(x)
    assert torch.equal(y[:, :255], SharedMantissa(E2M3, 3).nearest(x[:, :255]))
    assert torch.equal(y[:, 255:], E2M3.nearest(x[:, 255:]))  # alone it has a bit of its own
    assert torch.equal(short.nearest(x[:, :2]), SharedMantissa(E2M3, 2).nearest(x[:, :2]))


def test_learnt_rounding_is_an_error_that_names_the_alternative():
    with pytest.raises(UserError, match=r"this rounding.*choose rounding=nearest"):
        FORMATS[0].bracket(torch.randn(6))


@pytest.mark.parametrize(("base", "share"), [(floating(3, 0), 2), (E2M3, 0)])
def test_nothing_to_share_is_an_error(base: NumberFormat, share: int):
    with pytest.raises(ValueError, match="at least 1 mantissa bit, and a `share` of at least 1"):
        SharedMantissa(base, share)
