"""Scale rules: what they promise of every block, against brute force where it is cheap."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.scales import AbsMax, Affine, MinError, MinMax, Scale, ScaleRule, Scaling, from_parts, parts, stored

SYMMETRIC = [floating(2, 1), floating(3, 0), floating(3, 4), integer(4), integer(8)]
UNSIGNED = [integer(4, signed=False), integer(8, signed=False)]


def blocks(seed: int = 0, rows: int = 64, width: int = 32) -> Tensor:
    """Of every size, some lopsided, one all positive, one all negative, one of zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-4, 3, rows)[:, None]
    x[::3] += x[::3].abs().amax(1, keepdim=True) * 0.4
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
    return x


def rounded(x: Tensor, scaling: Scaling, fmt: NumberFormat) -> Tensor:
    return scaling.from_grid(fmt.nearest(scaling.to_grid(x)))


@pytest.mark.parametrize("fmt", SYMMETRIC, ids=lambda f: f.name)
def test_absmax_clips_nothing_and_wastes_nothing(fmt: NumberFormat):
    x = blocks()
    grid = AbsMax()(x, fmt).to_grid(x).abs().amax(1)
    assert (grid <= fmt.max * (1 + 1e-6)).all()
    assert (grid[1:] >= fmt.max * (1 - 1e-6)).all()
    largest = x.abs().amax(1)
    torch.testing.assert_close(rounded(x, AbsMax()(x, fmt), fmt).abs().amax(1), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fmt", UNSIGNED, ids=lambda f: f.name)
@given(seed=st.integers(0, 1000))
def test_minmax_keeps_zero_exact_and_errs_by_half_a_step(fmt: NumberFormat, seed: int):
    x = blocks(seed, rows=8)
    x[:, 0] = 0
    scaling = MinMax()(x, fmt)
    assert (rounded(x, scaling, fmt)[:, 0] == 0).all()
    assert (scaling.zero == scaling.zero.round()).all()
    assert ((rounded(x, scaling, fmt) - x).abs() <= scaling.scale * 0.5001).all()


def test_minmax_agrees_with_torch_fake_quantize():
    fmt, x = integer(8, signed=False), blocks(rows=40)[3:]
    scaling = MinMax()(x, fmt)
    for row, scale, zero, mine in zip(x, scaling.scale, scaling.zero, rounded(x, scaling, fmt), strict=True):
        theirs = torch.fake_quantize_per_tensor_affine(row, scale.item(), int(zero), 0, 255)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=scale.item() * 1.001)  # a tie may fall elsewhere
        assert ((mine - theirs).abs() < scale / 2).float().mean() > 0.99


@pytest.mark.parametrize("rule", [AbsMax, MinMax])
def test_stored_scales_are_representable(rule: type):
    scaling = rule(fp16)(blocks(), integer(4, signed=False))
    assert torch.equal(scaling.scale, scaling.scale.half().float())
    assert (scaling.scale > 0).all()


def test_a_stored_scale_never_becomes_zero():
    tiny = torch.tensor([[0.0], [1e-12], [1e-30]])
    assert torch.equal(stored(tiny, fp16), torch.full((3, 1), 2.0**-24))
    assert (stored(tiny, None) > 0).all()


@pytest.mark.parametrize("store", [None, fp16])
@pytest.mark.parametrize("rule", [AbsMax, MinMax, lambda s: MinError(AbsMax(s)), lambda s: MinError(MinMax(s))])
@pytest.mark.parametrize("fmt", [floating(2, 1), integer(4, signed=False)], ids=lambda f: f.name)
def test_a_block_of_zeros_stays_one(rule: type, store: NumberFormat | None, fmt: NumberFormat):
    x = torch.zeros(2, 8)
    assert torch.equal(rounded(x, rule(store)(x, fmt), fmt), x)


@pytest.mark.parametrize(("fmt", "base"), [(floating(2, 1), AbsMax()), (integer(4), AbsMax()), (UNSIGNED[0], MinMax())])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_min_error_is_the_best_of_all_clippings_block_by_block(fmt: NumberFormat, base: ScaleRule, p: float):
    x = blocks()
    rule = MinError(base, p=p, lowest=0.4, candidates=25)
    least = torch.full((len(x), 1), float("inf"))
    for ratio in torch.linspace(1, 0.4, 25):
        for i, row in enumerate(x):  # each block alone, so that nothing leaks between blocks
            clipped = row.clamp(row.min() * ratio, row.max() * ratio)[None]
            least[i] = torch.minimum(least[i], rule.error(row[None], base(clipped, fmt), fmt)[0])
    found = rule.error(x, rule(x, fmt), fmt)
    torch.testing.assert_close(found, least)
    assert (found <= rule.error(x, base(x, fmt), fmt)).all()
    assert (found < rule.error(x, base(x, fmt), fmt) * 0.99).any()


def test_the_cost_of_scales():
    fmt = integer(4, signed=False)
    assert AbsMax().bits(fmt) == 32
    assert AbsMax(fp16).bits(fmt) == 16
    assert MinMax(fp16).bits(fmt) == MinError(MinMax(fp16)).bits(fmt) == 16 + 4


@pytest.mark.parametrize("scaling", [Scale(torch.rand(3, 1)), Affine(torch.rand(3, 1), torch.ones(3, 1))])
def test_scalings_are_invertible_and_survive_storage(scaling: Scaling):
    x = torch.randn(3, 8)
    again = from_parts(parts(scaling))
    assert type(again) is type(scaling)
    torch.testing.assert_close(again.from_grid(scaling.to_grid(x)), x)
