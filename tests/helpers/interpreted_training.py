"""Tests of the low-bit training kernels in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from torch import Tensor

from fp4dit.lowbit_training import scaled_mm, triton_ops
from fp4dit.lowbit_training.operand_quant import (
    E2M1,
    ROTATION_SIZE,
    BlockOperandQuantizer,
    absmax_quantizer,
    mxfp8_quantizer,
    quest_quantizer,
    rotate_operand,
    rotation_matrix,
)
from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    ceil_exponent,
    even_exponent,
    floor_exponent,
    floor_ratio_exponent,
    nearest_ratio_exponent,
)
from fp4dit.numerics.block_scales import E8M0Scale as Power
from fp4dit.numerics.quantizer import PerGroup, Quantizer

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("test_training_kernels.py runs this file", allow_module_level=True)

by_rule = lambda rule: BlockOperandQuantizer(
    Quantizer(E2M1, PerGroup(ROTATION_SIZE), Power(rule)), record_clipped=True
)

WAYS = {
    "quest": quest_quantizer(),
    "quest, below": quest_quantizer(floor_ratio_exponent),
    "abs-max": absmax_quantizer(),
    "MXFP8": mxfp8_quantizer(),
    **{
        rule.__name__: by_rule(rule)
        for rule in (floor_exponent, ceil_exponent, even_exponent, nearest_ratio_exponent)
    },
    "ceiling": by_rule(CeilRatioExponent(7.25 / 6)),
}

SIGNS = (
    torch.randint(2, (ROTATION_SIZE,), generator=torch.Generator().manual_seed(7), dtype=torch.int8)
    * 2
    - 1
)


def exact_alpha() -> float:
    """Return the alpha for which the rotation holds 1 and -1, so that integer sums are exact."""
    entry = rotation_matrix(torch.device("cpu"), torch.float32, None, 1.0).abs().max()
    gains = [
        1 / entry,
        (1 / entry).nextafter(torch.tensor(9.0)),
        (1 / entry).nextafter(torch.tensor(0.0)),
    ]
    return next(gain.item() for gain in gains if gain * entry == 1)


def random_integers(m: int, k: int) -> Tensor:
    generator = torch.Generator().manual_seed(m + k)
    x = torch.randint(-8, 9, (m, k), generator=generator).float()
    x[0] = 0
    x[1, :ROTATION_SIZE] *= (
        2.0**-110
    )  # its squares are 0 in fp32; any smaller, and the interpreter would misread them in bf16
    x[2, :ROTATION_SIZE] *= 2.0**50
    return x


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_kernel_is_bit_exact_where_the_rotation_is_exact(name: str, transposed: bool):
    way, x = WAYS[name], random_integers(70, 75)
    x = x.T.contiguous().T if transposed else x
    known = triton_ops.make_kernel_config(way)
    assert known is not None
    for signs in (None, SIGNS):
        expected, actual = (
            way(rotate_operand(x, signs, exact_alpha())),
            triton_ops.quantize_operand_on_gpu(x, known, signs, exact_alpha()),
        )
        assert actual.values.dtype == torch.bfloat16
        assert actual.values.float().equal(expected.values)
        assert (actual.unclipped is None) == (expected.unclipped is None)
        assert actual.unclipped is None or (
            expected.unclipped is not None and actual.unclipped.equal(expected.unclipped)
        )
        assert actual.alpha == expected.alpha


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_is_nan_and_no_other(bad: float):
    x = torch.ones(3, 96)
    x[1, 40] = bad
    for way in (quest_quantizer(), absmax_quantizer()):
        known = triton_ops.make_kernel_config(way)
        assert known is not None
        is_nan = triton_ops.quantize_operand_on_gpu(x, known).values.isnan()
        assert is_nan[1, 32:64].all()
        assert is_nan.sum() == 32


@pytest.mark.parametrize(("name", "error"), [("quest", 0.0134), ("abs-max", 0.0137)])
def test_gaussian_values(name: str, error: float):
    """The errors are within 3 % of Quartet's table 2.

    Values may differ from the plain path only next to a rounding boundary.
    """
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))
    known = triton_ops.make_kernel_config(WAYS[name])
    assert known is not None
    operand, plain = triton_ops.quantize_operand_on_gpu(x, known), WAYS[name](rotate_operand(x))
    # Over an octave of sizes, for a power of two suits some better than others.
    sizes = 2 ** (torch.arange(4) / 4)
    errors = [
        (
            triton_ops.quantize_operand_on_gpu(x * s, known).values.float() * operand.alpha / s
            - rotate_operand(x)
        )
        .square()
        .mean()
        for s in sizes
    ]
    assert torch.stack(errors).mean().item() == pytest.approx(error, rel=0.03)
    assert (operand.values.float() != plain.values).float().mean() < 1e-4


def test_stochastic_rounding_is_unbiased_and_takes_neighbors():
    way = absmax_quantizer(stochastic=True)
    known, generator = triton_ops.make_kernel_config(way), torch.Generator().manual_seed(0)
    assert known is not None
    x, draws = torch.randn(2, 64, generator=generator), 400
    operand = triton_ops.quantize_operand_on_gpu(x.repeat(draws, 1), known, generator=generator)
    draws_out = (operand.values.float() * operand.alpha).view(draws, *x.shape)
    rotated = rotate_operand(x)
    scale = (
        way.quantizer.scale(rotated.view(-1, ROTATION_SIZE), E2M1)
        .scale.repeat_interleave(ROTATION_SIZE, 1)
        .view_as(x)
        * way.scale_multiplier
    )
    inner, outer = (end * scale for end in E2M1.bracket(rotated / scale))
    assert (((draws_out - inner).abs() < 1e-6) | ((draws_out - outer).abs() < 1e-6)).all()
    # Of two values a and b, the variance of a mean is at most (b - a)^2 / 4 / draws.
    assert (
        (draws_out.mean(0) - rotated).abs() <= 4.5 * (outer - inner).abs() / 2 / draws**0.5 + 1e-6
    ).all()
    again = triton_ops.quantize_operand_on_gpu(x, known, generator=torch.Generator().manual_seed(0))
    other = triton_ops.quantize_operand_on_gpu(x, known, generator=torch.Generator().manual_seed(0))
    assert again.values.equal(other.values)


@pytest.mark.parametrize("way", [quest_quantizer(), absmax_quantizer()], ids=["quest", "abs-max"])
def test_codes_and_scales_are_the_values(way: BlockOperandQuantizer):
    known, x = triton_ops.make_kernel_config(way), random_integers(70, 75)
    assert known is not None
    operand = triton_ops.quantize_operand_on_gpu(x, known, packed=True)
    assert operand.packed is not None
    assert operand.packed.codes.shape == (70, 48)
    assert scaled_mm.unpack_values(operand.packed).equal(operand.values)
