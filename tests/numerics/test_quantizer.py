"""Fake quantization: which values share a scale, and what one code costs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4dit.numerics.block_scales import E8M0Scale, NVFP4Scale
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer, nf4
from fp4dit.numerics.quantizer import (
    Granularity,
    PerChannel,
    PerGroup,
    PerHead,
    PerSplit,
    PerTensor,
    PerToken,
    Quantizer,
)
from fp4dit.numerics.scale_rules import AbsMax, MinMax, ScaleRule
from fp4dit.numerics.scale_search import MinError

E2M1, INT8, UINT4 = floating(2, 1), integer(8), integer(4, signed=False)
GRANULARITIES = [
    PerTensor(),
    PerChannel(),
    PerGroup(16),
    PerSplit(2),
]


@pytest.mark.parametrize(
    ("granularity", "scales"), zip(GRANULARITIES, [1, 12, 48, 24], strict=True)
)
def test_number_of_scales(granularity: Granularity, scales: int):
    x = torch.randn(3, 4, 64)
    assert Quantizer(E2M1, granularity).compute_qparams(x).scale.shape == (scales, 1)


def test_groups_run_along_a_row():
    """A group's values change only with its own, not with its row's others or the row above."""
    quantizer, x = Quantizer(E2M1, PerGroup(16)), torch.randn(4, 64)
    louder = x.clone()
    louder[1, 16:32] *= 100
    changed = (quantizer(louder) != quantizer(x)).nonzero()
    assert set(map(tuple, changed.tolist())) <= {(1, k) for k in range(16, 32)}
    assert len(changed) > 8


@pytest.mark.parametrize("group", [0, 48, 128])
def test_a_group_that_does_not_divide_says_what_to_do(group: int):
    quantizer = Quantizer(E2M1, PerGroup(group))
    message = (
        rf"group of {group} does not divide a row of 64 .*size that divides 64.*one scale per row"
    )
    with pytest.raises(ValueError, match=message):
        quantizer(torch.randn(2, 64))
    with pytest.raises(ValueError, match=message):
        quantizer.bits_per_value(torch.Size([2, 64]))


@pytest.mark.parametrize("parts", [0, 3, 128])
def test_parts_that_are_unequal_say_what_to_do(parts: int):
    quantizer = Quantizer(E2M1, PerSplit(parts))
    message = (
        rf"row of 64 values does not split into {parts} equal .* divides 64.*one scale per row"
    )
    with pytest.raises(ValueError, match=message):
        quantizer.bits_per_value(torch.Size([2, 64]))


def test_the_halves_of_a_row_are_quantized_as_if_alone():
    x = torch.randn(5, 64) * torch.tensor([1.0, 100.0]).repeat_interleave(32)
    halves = [Quantizer(INT8, PerToken())(half.contiguous()) for half in x.chunk(2, dim=1)]
    assert torch.equal(Quantizer(INT8, PerSplit(2))(x), torch.cat(halves, 1))


@pytest.mark.parametrize(
    ("fmt", "scale"), [(E2M1, E8M0Scale()), (integer(4), AbsMax(fp16))], ids=["mxfp4", "int4"]
)
def test_fp16_stays_finite(fmt: NumberFormat, scale: ScaleRule):
    """Its largest value is rounded beyond it on these grids."""
    quantizer = Quantizer(fmt, PerGroup(32), scale)
    x = torch.full((2, 32), 65504.0)
    assert quantizer(x).max() > 65504
    assert quantizer(x.half()).eq(65504).all()
    assert quantizer(-x.half()).eq(-65504).all()


def test_dynamic_scales_follow_each_token():
    """Scaling a token by a power of two scales its result exactly: neighbors do not matter."""
    quantizer, x = Quantizer(INT8, PerToken()), torch.randn(2, 5, 32)
    factor = 2.0 ** torch.arange(-5, 5).view(2, 5, 1)
    assert torch.equal(quantizer(x * factor), quantizer(x) * factor)
    alone = torch.stack([quantizer(token) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(quantizer(x), alone)


def test_a_given_scaling_is_used_instead_of_a_measured_one():
    quantizer, x = Quantizer(INT8, PerTensor()), torch.randn(6, 8)
    scaling = quantizer.compute_qparams(x)
    assert torch.equal(quantizer(x, scaling), quantizer(x))
    far = quantizer(x * 100, scaling)
    torch.testing.assert_close(
        far.abs().max(), x.abs().max()
    )  # saturates at the range it was given


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=lambda g: type(g).__name__)
@pytest.mark.parametrize(
    "fmt", [E2M1, floating(3, 0), floating(3, 4), INT8, UINT4], ids=lambda f: f.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_idempotent_with_its_own_scales(
    granularity: Granularity, fmt: NumberFormat, dtype: torch.dtype
):
    quantizer = Quantizer(fmt, granularity, AbsMax(fp16) if fmt.min else MinMax(fp16))
    x = torch.randn(8, 32).to(dtype)
    scaling = quantizer.compute_qparams(x)
    once = quantizer(x, scaling)
    assert once.dtype == dtype
    assert torch.equal(quantizer(once, scaling), once)


@settings(max_examples=15)
@given(shape=st.lists(st.integers(1, 3), min_size=3, max_size=3), seed=st.integers(0, 9))
def test_memory_layout_does_not_matter(shape: list[int], seed: int):
    x = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(seed))
    for granularity in GRANULARITIES:
        quantizer = Quantizer(E2M1, granularity)
        for order in [(0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)]:
            view = x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())
            assert torch.equal(quantizer(view), quantizer(x))
        expanded = x[:1].expand(3, *x.shape[1:])
        assert torch.equal(quantizer(expanded), quantizer(expanded.contiguous()))


def test_a_scale_per_head_is_that_of_all_its_tokens():
    """FP4DiT's code reshapes 4-D q, k and v to (samples * heads, tokens * channels)."""
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    x[:, :, 1] *= 9  # tokens that share a scale with others
    rows = x.reshape(2 * 3, 5 * 8)
    scale = rows.abs().amax(1, keepdim=True) / 127
    expected = ((rows / scale).round() * scale).view(x.shape)
    assert torch.equal(Quantizer(INT8, PerHead())(x), expected)


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [
        (Quantizer(E2M1, PerGroup(128), AbsMax(fp16)), 4 + 16 / 128),
        (Quantizer(UINT4, PerGroup(128), MinMax(fp16)), 4 + (16 + 4) / 128),
        (Quantizer(E2M1, PerChannel(), AbsMax(fp16)), 4 + 16 / 512),
        (Quantizer(INT8, PerTensor()), 8 + 32 / (512 * 64)),
        (Quantizer(E2M1, PerSplit(4), AbsMax(fp16)), 4 + 16 / 128),
        (Quantizer(E2M1, PerGroup(32), E8M0Scale()), 4.25),
        (Quantizer(E2M1, PerGroup(16), NVFP4Scale()), 4.5 + 32 / (512 * 64)),
        (
            Quantizer(FormatSelection([E2M1, integer(4)], LeastError()), PerGroup(32), E8M0Scale()),
            4.25,
        ),
        (
            Quantizer(
                FormatSelection([E2M1, integer(4)], LeastError(), "block"),
                PerGroup(32),
                E8M0Scale(),
            ),
            4.25 + 1 / 32,
        ),
        (
            Quantizer(
                FormatSelection([E2M1, integer(4)], LeastError(), "block"),
                PerGroup(16),
                MinError(NVFP4Scale()),
            ),
            4.5 + 32 / (512 * 64),  # as IF4 (arXiv:2603.28765), in the sign bit of the scale
        ),
        (
            Quantizer(
                FormatSelection([E2M1, integer(4), nf4], LeastError(), "block"), PerGroup(32)
            ),
            5 + 2 / 32,
        ),
    ],
)
def test_effective_bits_count_scales(quantizer: Quantizer, bits: float):
    assert quantizer.bits_per_value(torch.Size([64, 512])) == bits
