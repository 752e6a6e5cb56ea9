"""Formats chosen by the data."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fp4dit.numerics.format_selection import (
    FormatSelection,
    LeastError,
    PerBlockFormat,
    RangeRatio,
    SelectionCriterion,
)
from fp4dit.numerics.formats import Format, floating, integer, nf4
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.scale_rules import AbsMax, MinMax, ScaleRule
from fp4dit.numerics.scale_search import MinError
from fp4dit.rounding.adaround import AdaRound

E3M0, E2M1, E1M2 = THREE = floating(3, 0), floating(2, 1), floating(1, 2)


def random(law: str, blocks: int = 400, block: int = 1152) -> Tensor:
    torch.manual_seed(0)
    shape = (blocks, block)
    laws: dict[str, Callable[[], Tensor]] = {
        "uniform": lambda: torch.rand(shape) * 2 - 1,
        "gaussian": lambda: torch.randn(shape),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample(shape),
        "t3": lambda: torch.distributions.StudentT(3.0).sample(shape),
    }
    return laws[law]()


@pytest.mark.parametrize(
    ("law", "by", "shares"),
    [
        ("uniform", LeastError(), (0.0, 0.0, 1.0)),
        ("gaussian", LeastError(), (0.0, 1.0, 0.0)),
        ("laplace", LeastError(), (0.01, 0.99, 0.0)),
        ("t3", LeastError(), (0.71, 0.29, 0.0)),
        ("uniform", RangeRatio(), (0.0, 0.0, 1.0)),
        ("gaussian", RangeRatio(), (0.0, 0.94, 0.06)),
        ("laplace", RangeRatio(), (0.34, 0.66, 0.0)),
        ("t3", RangeRatio(), (0.92, 0.08, 0.0)),
    ],
)
def test_share_of_channels_that_prefer_each_format(
    law: str, by: SelectionCriterion, shares: tuple[float, ...]
):
    """Computed independently with NumPy for the design notes: channels of 1152 values,
    scaled by their maximum.
    """
    index = FormatSelection(THREE, by, per="block").select_formats(random(law), AbsMax())
    measured = index.flatten().bincount(minlength=3) / len(index)
    torch.testing.assert_close(measured, torch.tensor(shares), rtol=0, atol=0.06)


@pytest.mark.parametrize(
    ("law", "fmt"), [("uniform", E1M2), ("gaussian", E2M1), ("laplace", E2M1), ("t3", E3M0)]
)
@pytest.mark.parametrize("per", ["tensor", "majority"])
@pytest.mark.parametrize("by", [LeastError(), RangeRatio()], ids=repr)
def test_one_format_for_a_tensor(law: str, fmt: Format, per, by: SelectionCriterion):
    choice = FormatSelection(THREE, by, per)
    index = choice.select_formats(random(law, blocks=100), AbsMax())
    assert index.shape == (1, 1)
    assert choice.format_at(index) == fmt


@pytest.mark.parametrize(
    "rule", [AbsMax(), MinError(AbsMax(), candidates=10), MinError(AbsMax(), p=1.0, candidates=5)]
)
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_least_error_is_that_of_quantizing_with_each(rule: ScaleRule, p: float):
    x = random("laplace", 20, 64)
    errors = []
    for fmt in THREE:
        scale = rule(x, fmt).scale
        levels = fmt.values() * scale
        distance = (x[:, :, None] - levels[:, None, :]).abs().amin(2)
        errors.append(distance.pow(p).sum(1))
    torch.testing.assert_close(LeastError(p)(x, THREE, rule), torch.stack(errors))
    assert torch.equal(
        FormatSelection(THREE, LeastError(p), "block").select_formats(x, rule)[:, 0].long(),
        torch.stack(errors).argmin(0),
    )


def test_a_tensor_weighs_errors_and_a_majority_counts_heads():
    x = random("uniform", 5, 256)
    x[0] = 1000 * random("gaussian", 1, 256)[0]
    for per, fmt in [("tensor", E2M1), ("majority", E1M2)]:
        choice = FormatSelection(THREE, LeastError(), per)
        assert choice.format_at(choice.select_formats(x, AbsMax())) == fmt


@pytest.mark.parametrize("per", ["tensor", "block", "majority"])
def test_of_equals_the_earlier_wins(per):
    x = random("uniform", 4, 32)
    for formats in [(E1M2, integer(4)), (integer(4), E1M2)]:  # one the double of the other
        choice = FormatSelection(formats, LeastError(), per)
        assert not choice.select_formats(x, AbsMax()).any()
    assert (
        not FormatSelection(THREE, LeastError(), per)
        .select_formats(torch.zeros(4, 32), AbsMax())
        .any()
    )


@pytest.mark.parametrize(
    ("ratio", "fmt"), [(64, E3M0), (12, E2M1), (7, E1M2), (28, E3M0), (27, E2M1), (9, E1M2)]
)
def test_range_ratio_compares_octaves(ratio: float, fmt: Format):
    """Largest over smallest is 64, 12 and 7; the geometric means 27.7 and 9.2 divide them."""
    x = torch.tensor([ratio, -1.0, 1.0, 1.0, -2.0]) * 0.3
    costs = RangeRatio()(x[None], THREE, AbsMax())
    expected = (torch.tensor([64.0, 12, 7]).log2() - torch.tensor(ratio).log2()).abs()
    torch.testing.assert_close(costs[:, 0], expected)
    assert THREE[int(costs[:, 0].argmin())] == fmt


def test_a_pooled_range_ratio_is_measured_on_all_values_at_once():
    """Two flat blocks of different size: neither has a range by itself."""
    x = torch.ones(2, 32) * torch.tensor([[1.0], [64.0]])
    for by, fmt in [(RangeRatio(), E1M2), (RangeRatio(pooled=True), E3M0)]:
        choice = FormatSelection(THREE, by)
        assert choice.format_at(choice.select_formats(x, AbsMax())) == fmt
    torch.testing.assert_close(RangeRatio(0.0, pooled=True)(x, [E3M0], AbsMax()), torch.zeros(1, 2))


def test_range_ratio_of_zeros_is_a_number():
    x = torch.zeros(3, 8)
    x[1, 0] = 1
    assert RangeRatio()(x, THREE, AbsMax()).isfinite().all()


def test_its_name_and_bits():
    choice = FormatSelection(THREE, LeastError())
    assert (choice.name, choice.bits) == ("e3m0|e2m1|e1m2", 4)
    mixed = choice.format_at(torch.tensor([[0], [2]], dtype=torch.uint8))
    assert isinstance(mixed, Format)
    assert (mixed.name, mixed.bits) == (choice.name, choice.bits)
    for formats in [(E2M1, floating(2, 3)), ()]:
        with pytest.raises(ValueError, match="same number of bits: "):
            FormatSelection(formats, LeastError())


@pytest.mark.parametrize(
    "rule", [AbsMax(), MinMax(), MinError(AbsMax(), candidates=7)], ids=lambda r: type(r).__name__
)
def test_mixed_is_each_format_on_its_own_rows(rule: ScaleRule):
    formats = (
        (E2M1, integer(4), nf4)
        if not isinstance(rule, MinMax)
        else (integer(4, signed=False), integer(4))
    )
    index = torch.randint(
        len(formats), (40, 1), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    x = random("t3", 40, 16)
    mixed = PerBlockFormat(formats, index)
    scaling = rule(x, mixed)  # pyright: ignore[reportArgumentType]
    grid = scaling.to_grid(x)
    for i, fmt in enumerate(formats):
        rows = index[:, 0] == i
        alone = rule(x[rows], fmt)
        assert torch.equal(scaling.scale[rows], alone.scale)
        assert torch.equal(grid[rows], alone.to_grid(x[rows]))
        assert torch.equal(mixed.nearest(grid)[rows], fmt.nearest(grid[rows]))
        assert torch.equal(mixed.step(grid)[rows], fmt.step(grid[rows]))
        for whole, part in zip(mixed.bracket(grid), fmt.bracket(grid[rows]), strict=True):
            assert torch.equal(whole[rows], part)
    assert set(mixed.values().tolist()) == {v for fmt in formats for v in fmt.values().tolist()}


def test_mixed_formats_can_be_learnt():
    x = random("gaussian", 6, 16)
    mixed = PerBlockFormat(THREE, torch.tensor([0, 1, 2, 0, 1, 2], dtype=torch.uint8)[:, None])
    scaling = AbsMax()(x, mixed)  # pyright: ignore[reportArgumentType]
    assert isinstance(scaling, Scale)
    rounding = AdaRound(x, mixed, scaling)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(
        rounding.hard_weight(), scaling.from_grid(mixed.nearest(scaling.to_grid(x)))
    )
    torch.testing.assert_close(rounding.soft_weight()[0], x)
