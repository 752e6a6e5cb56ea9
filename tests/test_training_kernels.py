"""Kernels of low-bit training: what they compile to, and who multiplies. What they compute, test_kernels.py asks."""

import logging
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fp4dit.blockscales import E8M0, Ceiling, below, ceil, even, floor, nearest
from fp4dit.formats import floating, nf4
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, Deviations
from fp4dit.training import kernels, programs, scaled
from fp4dit.training.product import product
from fp4dit.training.projections import E2M1, Packed, Projected, Rounded, absmax, mxfp8, nvfp4, quest
from tests.test_kernels import NOTHING, compiled, spilled

RULES = [floor, ceil, even, nearest, below, Ceiling(), Ceiling(7.25 / 6)]


@pytest.mark.parametrize("fmt", [E2M1, floating(4, 3, reserved=1), floating(2, 3)], ids=lambda f: f.name)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: getattr(rule, "__name__", repr(rule)))
def test_a_rule_is_a_step_in_each_binade(rule, fmt):
    """Found by asking; and so it is for any reach, and next to the step."""
    offset, threshold = kernels.steps(rule, fmt)
    at = torch.tensor(threshold)
    mantissas = torch.cat([1 + torch.rand(999, generator=torch.Generator().manual_seed(0)), torch.ones(1)])
    mantissas = torch.cat([mantissas, at[None] / 2, at[None], at.nextafter(torch.tensor(0.0))[None]])
    for exponent in (-126, -3, 0, 100):
        reach = torch.ldexp(mantissas, torch.tensor(exponent))[:, None]
        fraction, power = torch.frexp(reach)
        wanted = power - 1 + offset + (2 * fraction >= threshold).int()
        assert rule(reach, fmt).equal(wanted)


@pytest.mark.parametrize(
    "way",
    [
        nvfp4(),
        quest(reach=Deviations()),
        Rounded(Quantizer(E2M1, Granularity("group", 16), E8M0())),
        Rounded(Quantizer(E2M1, Granularity("group", 32), AbsMax())),
        Rounded(Quantizer(E2M1, Granularity("group", 32), E8M0(shifts=(0, 1)))),
        Rounded(Quantizer(nf4, Granularity("group", 32), E8M0())),
    ],
    ids=["NVFP4", "deviations", "blocks of 16", "abs-max", "a search", "a codebook"],
)
def test_what_no_kernel_does_is_left_to_the_plain_path(way: Rounded):
    assert kernels.settings(way) is None


TYPES = {"x": "*bf16", "turn": "*fp32", "values": "*bf16", "m": "i32", "k": "i32", "stride_m": "i32", "stride_k": "i32"}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("way", [quest(), absmax(stochastic=True), mxfp8()], ids=["quest", "stochastic", "MXFP8"])
def test_they_compile_without_spills(way: Rounded, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    known = kernels.settings(way)
    assert known is not None
    fmt, packs = known.format, capability == 100 and known.format == E2M1
    given = {"seed": way.stochastic and "*i64", "kept": way.masked and "*i1"}
    given |= dict.fromkeys(("codes", "scales"), packs and "*u8")
    types = TYPES | {name: kind for name, kind in given.items() if kind}
    constants = {
        **dict.fromkeys([name for name, kind in given.items() if not kind]),
        **{"WIDTH": 1152, "OFFSET": known.offset, "THRESHOLD": known.threshold, "COUNT": known.count},
        **{"MANTISSA": fmt.mantissa, "FLOOR": 2.0**fmt.min_exponent, "LARGEST": fmt.max, "WIDEN": float(way.widen)},
        **{"ROWS": kernels.ROWS, "BLOCK": 32},
    }
    made = compiled(programs.projected, types, constants, capability, num_warps=4)
    assert spilled(made, tmp_path) == NOTHING


def packed(m: int, k: int) -> Packed:
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(256, (m, k // 2), generator=generator, dtype=torch.uint8)
    return Packed(codes, torch.randint(120, 135, (m, k // 32), generator=generator, dtype=torch.uint8))


def test_scales_lie_where_cublas_reads_them():
    """Of the row r and block c: 512 bytes a tile of 128 x 4, and in it 16 (r mod 32) + 4 (r div 32) + c."""
    m, blocks = 200, 6
    scales = torch.randint(1, 256, (m, blocks), dtype=torch.uint8)
    found = scaled.swizzled(scales)
    assert len(found) == 256 * 8
    for r in range(m):
        for c in range(blocks):
            tile, row, column = (r // 128) * 2 + c // 4, r % 128, c % 4
            assert found[512 * tile + 16 * (row % 32) + 4 * (row // 32) + column] == scales[r, c]
    assert (found == 0).sum() == len(found) - m * blocks


def test_codes_are_read_as_torch_packs_them():
    """Against the values of E2M1, written out, and of E8M0 by torch."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    codes = torch.arange(16, dtype=torch.uint8)[None] | (torch.arange(16, dtype=torch.uint8).flip(0)[None] << 4)
    scale = torch.tensor([[130]], dtype=torch.uint8)
    found = scaled.values(Packed(codes, scale)).float()
    assert found[0, ::2].tolist() == [8 * v for v in values]
    assert found[0, 1::2].tolist() == [8 * v for v in values[::-1]]
    assert scale.view(torch.float8_e8m0fnu).float().item() == 8


def test_torch_is_given_what_it_asks_for(monkeypatch):
    """Row-major times column-major, both of codes, with as many scales as tiles have; and the gain comes after it."""
    left, right, given = packed(70, 96), packed(48, 96), {}

    def multiply(a, b, a_scale, a_recipe, b_scale, b_recipe, a_order, b_order, output_dtype):
        given.update(a=a, b=b, scales=(a_scale, b_scale), recipes={a_recipe, b_recipe}, orders={a_order, b_order})
        return (scaled.values(left).float() @ scaled.values(right).float().T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", multiply)
    sides = [Projected(scaled.values(side), 2.0, None, side) for side in (left, right)]
    made = product(*sides, torch.bfloat16)
    assert made.equal(multiply(*[None] * 8, torch.bfloat16) * 4)
    assert given["a"] is None
    product(*sides, torch.float32)  # which wants more digits than bf16 has
    assert given["a"] is None
    scaled.multiply(left, right)
    assert {given["a"].dtype, given["b"].dtype} == {torch.float4_e2m1fn_x2}
    assert (given["a"].shape, given["b"].shape, given["b"].stride()) == ((70, 48), (48, 48), (1, 48))
    assert [(s.dtype, len(s)) for s in given["scales"]] == [(torch.float8_e8m0fnu, 512)] * 2
    assert (given["recipes"], given["orders"]) == ({F.ScalingType.BlockWise1x32}, {F.SwizzleType.SWIZZLE_32_4_4})


def test_the_log_says_who_multiplies(caplog):
    scaled.offered.cache_clear()
    with caplog.at_level(logging.INFO):
        assert not scaled.offered(torch.device("cpu"))
        assert not scaled.offered(torch.device("cpu"))
    assert caplog.messages == ["MXFP4 products on cpu are emulated in bf16: only GPUs have block-scaled ones"]


@pytest.mark.parametrize(
    ("capability", "answer", "why"),
    [
        ((9, 0), None, "compute capability 9.0 has no block-scaled ones"),
        ((10, 0), RuntimeError("MXFP4 needs a build with FBGEMM\nat ..."), "MXFP4 needs a build with FBGEMM"),
        ((10, 0), 0.5, "torch's product is wrong"),
        ((12, 0), 1.0, ""),
    ],
)
def test_a_product_is_tried_before_it_is_relied_on(monkeypatch, capability, answer, why: str):
    """Of random codes, against what the same codes give in fp32."""

    def multiply(left: Packed, right: Packed) -> torch.Tensor:
        if isinstance(answer, Exception):
            raise answer
        return (scaled.values(left).float() @ scaled.values(right).float().T * answer).bfloat16()

    made = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: made())
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda *given, device, **kw: randint(*given, **kw))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(scaled, "multiply", multiply)
    assert scaled.refusal(torch.device("cuda")) == why
