"""Cases of test_training_kernels.py that run in Triton's interpreter, where TRITON_INTERPRET=1 from the start."""

import os

import pytest
import torch
from torch import Tensor

from fp4dit.blockscales import E8M0 as Power
from fp4dit.blockscales import Ceiling, below, ceil, even, floor, nearest
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.training import kernels, scaled
from fp4dit.training.projections import BLOCK, E2M1, Rounded, absmax, mxfp8, quest, turn, turned

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_training_kernels.py runs this file", allow_module_level=True)

by_rule = lambda rule: Rounded(Quantizer(E2M1, Granularity("group", BLOCK), Power(rule)), masked=True)
WAYS = {
    "quest": quest(),
    "quest, below": quest(below),
    "abs-max": absmax(),
    "MXFP8": mxfp8(),
    **{rule.__name__: by_rule(rule) for rule in (floor, ceil, even, nearest)},
    "ceiling": by_rule(Ceiling(7.25 / 6)),
}
SIGNS = torch.randint(2, (BLOCK,), generator=torch.Generator().manual_seed(7), dtype=torch.int8) * 2 - 1


def exact() -> float:
    """The gain with which the rotation is of 1 and -1, so that sums of integers have no rounding error."""
    entry = turn(torch.device("cpu"), torch.float32, None, 1.0).abs().max()
    gains = [1 / entry, (1 / entry).nextafter(torch.tensor(9.0)), (1 / entry).nextafter(torch.tensor(0.0))]
    return next(gain.item() for gain in gains if gain * entry == 1)


def integers(m: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randint(-8, 9, (m, k), generator=generator).float()
    x[0] = 0
    x[1, :BLOCK] *= 2.0**-110  # its squares are 0 in fp32; any smaller, and the interpreter would misread them in bf16
    x[2, :BLOCK] *= 2.0**50
    return x


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_to_the_bit_as_without_a_kernel_where_the_rotation_is_exact(name: str, transposed: bool):
    way, x = WAYS[name], integers(70, 75)
    x = x.T.contiguous().T if transposed else x
    known = kernels.settings(way)
    assert known is not None
    for signs in (None, SIGNS):
        wanted, found = way(turned(x, signs, exact())), kernels.project(x, known, signs, exact())
        assert found.values.dtype == torch.bfloat16
        assert found.values.float().equal(wanted.values)
        assert (found.kept is None) == (wanted.kept is None)
        assert found.kept is None or (wanted.kept is not None and found.kept.equal(wanted.kept))
        assert found.gain == wanted.gain


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bad: float):
    x = torch.ones(3, 96)
    x[1, 40] = bad
    for way in (quest(), absmax()):
        known = kernels.settings(way)
        assert known is not None
        found = kernels.project(x, known).values.isnan()
        assert found[1, 32:64].all()
        assert found.sum() == 32


@pytest.mark.parametrize(("name", "error"), [("quest", 0.0134), ("abs-max", 0.0137)])
def test_gaussian_values(name: str, error: float):
    """Quartet's table 2 within 3 %; and what is next to a rounding boundary alone may differ from the plain path."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    known = kernels.settings(WAYS[name])
    assert known is not None
    made, plain = kernels.project(x, known), WAYS[name](turned(x))
    # Over an octave of sizes, for a power of two suits some better than others.
    sizes = 2 ** (torch.arange(4) / 4)
    errors = [(kernels.project(x * s, known).values.float() * made.gain / s - turned(x)).square().mean() for s in sizes]
    assert torch.stack(errors).mean().item() == pytest.approx(error, rel=0.03)
    assert (made.values.float() != plain.values).float().mean() < 1e-4


def test_stochastic_rounding_is_unbiased_and_takes_neighbours():
    way = absmax(stochastic=True)
    known, generator = kernels.settings(way), torch.Generator().manual_seed(0)
    assert known is not None
    x, draws = torch.randn(2, 64, generator=generator), 400
    found = kernels.project(x.repeat(draws, 1), known, generator=generator)
    made = (found.values.float() * found.gain).view(draws, *x.shape)
    rotated = turned(x)
    scale = way.quantizer.scale(rotated.view(-1, BLOCK), E2M1).scale.repeat_interleave(BLOCK, 1).view_as(x) * way.widen
    inner, outer = (end * scale for end in E2M1.bracket(rotated / scale))
    assert (((made - inner).abs() < 1e-6) | ((made - outer).abs() < 1e-6)).all()
    # Of two values a and b, the variance of a mean is at most (b - a)^2 / 4 / draws.
    assert ((made.mean(0) - rotated).abs() <= 4.5 * (outer - inner).abs() / 2 / draws**0.5 + 1e-6).all()
    again = kernels.project(x, known, generator=torch.Generator().manual_seed(0))
    other = kernels.project(x, known, generator=torch.Generator().manual_seed(0))
    assert again.values.equal(other.values)


@pytest.mark.parametrize("way", [quest(), absmax()], ids=["quest", "abs-max"])
def test_codes_and_scales_are_the_values(way: Rounded):
    known, x = kernels.settings(way), integers(70, 75)
    assert known is not None
    made = kernels.project(x, known, packed=True)
    assert made.packed is not None
    assert made.packed.codes.shape == (70, 48)
    assert scaled.values(made.packed).equal(made.values)
