"""Compilation of the low-bit training kernels, and the choice of the product.

tests/packed/test_triton_kernels.py runs the tests of their results.
"""

import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fp4dit.lowbit_training import scaled_mm, triton_kernels, triton_ops
from fp4dit.lowbit_training.matmul import matmul_operands
from fp4dit.lowbit_training.operand_quant import (
    E2M1,
    BlockOperandQuantizer,
    PackedMXFP4,
    QuantizedOperand,
    absmax_quantizer,
    mxfp8_quantizer,
    nvfp4_quantizer,
    quest_quantizer,
)
from fp4dit.numerics.block_scales import (
    CeilRatioExponent,
    E8M0Scale,
    ceil_exponent,
    even_exponent,
    floor_exponent,
    floor_ratio_exponent,
    nearest_ratio_exponent,
)
from fp4dit.numerics.formats import floating, nf4
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, StandardDeviations
from tests.packed.test_triton_kernels import NO_SPILLS, compile_kernel, read_spills

RULES = [
    floor_exponent,
    ceil_exponent,
    even_exponent,
    nearest_ratio_exponent,
    floor_ratio_exponent,
    CeilRatioExponent(),
    CeilRatioExponent(7.25 / 6),
]


@pytest.mark.parametrize(
    "fmt", [E2M1, floating(4, 3, reserved=1), floating(2, 3)], ids=lambda f: f.name
)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", repr(rule)))
def test_a_rule_is_a_step_in_each_binade(rule, fmt):
    """Found by asking; and so it is for any reach, and next to the step."""
    offset, threshold = triton_ops.find_exponent_threshold(rule, fmt)
    at = torch.tensor(threshold)
    mantissas = torch.cat(
        [1 + torch.rand(999, generator=torch.Generator().manual_seed(0)), torch.ones(1)]
    )
    mantissas = torch.cat(
        [mantissas, at[None] / 2, at[None], at.nextafter(torch.tensor(0.0))[None]]
    )
    for exponent in (-126, -3, 0, 100):
        reach = torch.ldexp(mantissas, torch.tensor(exponent))[:, None]
        fraction, power = torch.frexp(reach)
        expected = power - 1 + offset + (2 * fraction >= threshold).int()
        assert rule(reach, fmt).equal(expected)


@pytest.mark.parametrize(
    "way",
    [
        nvfp4_quantizer(),
        quest_quantizer(reach=StandardDeviations()),
        BlockOperandQuantizer(Quantizer(E2M1, PerGroup(16), E8M0Scale())),
        BlockOperandQuantizer(Quantizer(E2M1, PerGroup(32), AbsMax())),
        BlockOperandQuantizer(Quantizer(E2M1, PerGroup(32), E8M0Scale(shifts=(0, 1)))),
        BlockOperandQuantizer(Quantizer(nf4, PerGroup(32), E8M0Scale())),
    ],
    ids=["NVFP4", "deviations", "blocks of 16", "abs-max", "a search", "a codebook"],
)
def test_unsupported_quantizers_use_the_plain_path(way: BlockOperandQuantizer):
    assert triton_ops.make_kernel_config(way) is None


TYPES = {
    "x": "*bf16",
    "rotation": "*fp32",
    "values": "*bf16",
    "m": "i32",
    "k": "i32",
    "stride_m": "i32",
    "stride_k": "i32",
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    "way",
    [quest_quantizer(), absmax_quantizer(stochastic=True), mxfp8_quantizer()],
    ids=["quest", "stochastic", "MXFP8"],
)
def test_kernels_compile_without_spills(
    way: BlockOperandQuantizer, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = triton_ops.make_kernel_config(way)
    assert known is not None
    fmt, packs = known.format, capability == 100 and known.format == E2M1
    optional = {"seed": way.stochastic and "*i64", "unclipped": way.record_clipped and "*i1"}
    optional |= dict.fromkeys(("codes", "scales"), packs and "*u8")
    types = TYPES | {name: kind for name, kind in optional.items() if kind}
    constants = {
        **dict.fromkeys([name for name, kind in optional.items() if not kind]),
        **{
            "WIDTH": 1152,
            "OFFSET": known.offset,
            "THRESHOLD": known.threshold,
            "COUNT": known.count,
        },
        **{
            "MANTISSA": fmt.mantissa,
            "FLOOR": 2.0**fmt.min_exponent,
            "LARGEST": fmt.max,
            "WIDEN": float(way.scale_multiplier),
        },
        **{"ROWS": triton_ops.ROWS, "BLOCK": 32},
    }
    binary = compile_kernel(
        triton_kernels.quantize_operand_kernel, types, constants, capability, num_warps=4
    )
    assert read_spills(binary, tmp_path) == NO_SPILLS


def random_packed(m: int, k: int) -> PackedMXFP4:
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(256, (m, k // 2), generator=generator, dtype=torch.uint8)
    return PackedMXFP4(
        codes, torch.randint(120, 135, (m, k // 32), generator=generator, dtype=torch.uint8)
    )


def test_scales_have_the_layout_of_cublas():
    """A tile has 512 bytes; row r and block c are at 16 (r mod 32) + 4 (r div 32) + c."""
    m, blocks = 200, 6
    scales = torch.randint(1, 256, (m, blocks), dtype=torch.uint8)
    swizzled = scaled_mm.swizzle_scales(scales)
    assert len(swizzled) == 256 * 8
    for r in range(m):
        for c in range(blocks):
            tile, row, column = (r // 128) * 2 + c // 4, r % 128, c % 4
            assert swizzled[512 * tile + 16 * (row % 32) + 4 * (row // 32) + column] == scales[r, c]
    assert (swizzled == 0).sum() == len(swizzled) - m * blocks


def test_codes_are_packed_as_in_torch():
    """Against the values of E2M1, written out, and of E8M0 by torch."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    codes = torch.arange(16, dtype=torch.uint8)[None] | (
        torch.arange(16, dtype=torch.uint8).flip(0)[None] << 4
    )
    scale = torch.tensor([[130]], dtype=torch.uint8)
    values_out = scaled_mm.unpack_values(PackedMXFP4(codes, scale)).float()
    assert values_out[0, ::2].tolist() == [8 * v for v in values]
    assert values_out[0, 1::2].tolist() == [8 * v for v in values[::-1]]
    assert scale.view(torch.float8_e8m0fnu).float().item() == 8


def test_scaled_mm_gets_valid_arguments(monkeypatch):
    """Codes are row-major times column-major, scales fill tiles, and alpha comes after."""
    left, right, call = random_packed(70, 96), random_packed(48, 96), {}

    def multiply(a, b, a_scale, a_recipe, b_scale, b_recipe, a_order, b_order, output_dtype):
        call.update(
            a=a,
            b=b,
            scales=(a_scale, b_scale),
            recipes={a_recipe, b_recipe},
            orders={a_order, b_order},
        )
        return (
            scaled_mm.unpack_values(left).float() @ scaled_mm.unpack_values(right).float().T
        ).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", multiply)
    sides = [
        QuantizedOperand(scaled_mm.unpack_values(side), 2.0, None, side) for side in (left, right)
    ]
    product = matmul_operands(*sides, torch.bfloat16)
    assert product.equal(multiply(*[None] * 8, torch.bfloat16) * 4)
    assert call["a"] is None
    matmul_operands(*sides, torch.float32)  # which wants more digits than bf16 has
    assert call["a"] is None
    scaled_mm.matmul_scaled(left, right)
    assert {call["a"].dtype, call["b"].dtype} == {torch.float4_e2m1fn_x2}
    assert (call["a"].shape, call["b"].shape, call["b"].stride()) == (
        (70, 48),
        (48, 48),
        (1, 48),
    )
    assert [(s.dtype, len(s)) for s in call["scales"]] == [(torch.float8_e8m0fnu, 512)] * 2
    assert (call["recipes"], call["orders"]) == (
        {F.ScalingType.BlockWise1x32},
        {F.SwizzleType.SWIZZLE_32_4_4},
    )


def test_the_log_names_the_product_in_use(caplog):
    scaled_mm.supports_scaled_mm.cache_clear()
    with caplog.at_level(logging.INFO):
        assert not scaled_mm.supports_scaled_mm(torch.device("cpu"))
        assert not scaled_mm.supports_scaled_mm(torch.device("cpu"))
    assert caplog.messages == [
        "MXFP4 products on cpu are emulated in bf16: only GPUs have block-scaled ones"
    ]


@pytest.mark.parametrize(
    ("capability", "answer", "why"),
    [
        ((9, 0), None, "compute capability 9.0 has no block-scaled ones"),
        (
            (10, 0),
            RuntimeError("MXFP4 needs a build with FBGEMM\nat ..."),
            "MXFP4 needs a build with FBGEMM",
        ),
        ((10, 0), 0.5, "torch's product is wrong"),
        ((12, 0), 1.0, ""),
    ],
)
def test_a_product_is_tried_before_it_is_used(monkeypatch, capability, answer, why: str):
    """The product of random codes is compared with that in fp32."""

    def multiply(left: PackedMXFP4, right: PackedMXFP4) -> torch.Tensor:
        if isinstance(answer, Exception):
            raise answer
        return (
            scaled_mm.unpack_values(left).float()
            @ scaled_mm.unpack_values(right).float().T
            * answer
        ).bfloat16()

    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    randint = torch.randint
    monkeypatch.setattr(
        torch, "randint", lambda *arguments, device, **kw: randint(*arguments, **kw)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(scaled_mm, "matmul_scaled", multiply)
    assert scaled_mm.explain_unsupported(torch.device("cuda")) == why
