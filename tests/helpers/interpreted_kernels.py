"""Tests that packed/test_triton_kernels.py runs in Triton's interpreter.

The process has TRITON_INTERPRET=1 from the start.
"""

import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from torch.nn import functional as F
from triton.runtime import interpreter

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.quantizer import Granularity, PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn import triton_kernels, triton_ops
from fp4dit.packed.nn.backends import DequantizeBackend, IntegerBackend
from fp4dit.packed.nn.gpu_backends import (
    Fp8Backend,
    Int8Backend,
    WeightOnlyBackend,
    can_expand_codes,
)
from fp4dit.packed.nn.kernels import find_kernels
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("packed/test_triton_kernels.py runs this file", allow_module_level=True)

E4M3_DTYPE = torch.float8_e4m3fn
TOKEN_FORMATS = [E4M3, floating(2, 3), floating(3, 2), floating(2, 1)]
INT8_TOKENS = [floating(2, 3), floating(2, 1), integer(4), integer(6), integer(8)]
WEIGHT_FORMATS = [floating(2, 1), floating(1, 2), floating(3, 0), integer(4)]


def format_id(fmt) -> str:
    return fmt.name


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch: pytest.MonkeyPatch):
    """Multiply bf16 in fp32, because Triton 3.6's interpreter takes bits of bf16 for integers."""
    dot = interpreter.InterpreterBuilder.create_dot

    def in_fp32(self, a, b, *rest):
        if a.dtype == tl.bfloat16:
            a, b = (self.create_fp_ext(side, tl.float32) for side in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_fp32)


@triton.jit
def expand(codes, out, SHIFT: tl.constexpr):
    row, word, column = tl.arange(0, 16), tl.arange(0, 2), tl.arange(0, 16)
    words = tl.load(codes.to(tl.pointer_type(tl.uint32)) + row[:, None] * 2 + word[None, :])
    tl.store(
        out + row[:, None] * 16 + column[None, :],
        triton_kernels.expand_operand(words, SHIFT, out.dtype.element_ty),
    )


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32]
)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_registers_hold_expanded_codes(dtype: torch.dtype, shift: int):
    """Expand all 256 bytes of two codes."""
    codes = torch.arange(256, dtype=torch.uint8)[torch.randperm(256)[:128]].view(16, 8)
    out = torch.empty(16, 16, dtype=dtype)
    expand[(1,)](codes, out, shift)
    assert out.float().equal(triton_ops.expand_codes(codes, shift).float())
    assert out.float().signbit().equal(triton_ops.expand_codes(codes, shift).float().signbit())


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=format_id)
def test_registers_hold_whole_numbers(fmt: NumberFormat):
    """Expand all 256 bytes of two codes."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)[:, torch.randperm(16)]
    magnitudes = fmt.values()[fmt.values() >= 0] / fmt.smallest
    numbers = torch.cat([magnitudes, -magnitudes]).to(torch.int8)
    for half in codes.split(8, 1):
        out = torch.empty(16, 16, dtype=torch.int8)
        expand[(1,)](half.contiguous(), out, 3 - min(fmt.mantissa, 2))
        assert out[:, 0::2].equal(numbers[half.int() & 15])
        assert out[:, 1::2].equal(numbers[half.int() >> 4])


def tokens(largest: float) -> torch.Tensor:
    """Return tokens of ordinary, huge, tiny, subnormal and zero size, and ties between values."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1.0, 1e-3, 1e37, 1e-37, 1e-42, 0.0])[:, None]
    random = torch.randn(6, 200, generator=generator) * sizes
    ties = torch.cat([torch.arange(-99, 100) / 32 * largest / 4, torch.tensor([largest])])
    fine = torch.cat([torch.arange(-99, 100) / 2**10, torch.tensor([largest])])
    return torch.cat([random, ties[None].clamp(-largest, largest), fine[None]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", TOKEN_FORMATS, ids=format_id)
def test_quantized_tokens_are_bit_exact(fmt, dtype: torch.dtype):
    x = tokens(fmt.max).to(dtype).nan_to_num(posinf=6e4, neginf=-6e4)
    if dtype == torch.bfloat16:
        x[x.abs() < torch.finfo(dtype).tiny] = 0  # the interpreter misreads bf16's subnormals
    values, scale = triton_ops.quantize_rows(x, fmt.mantissa, fmt.min_exponent, fmt.max, E4M3_DTYPE)
    simulated = Quantizer(fmt, PerChannel())
    assert (
        (values.float() * scale[:, None])
        .view(torch.int32)
        .equal(simulated(x.float()).view(torch.int32))
    )
    assert scale[:, None].equal(simulated.compute_qparams(x).scale)


@pytest.mark.parametrize("fmt", INT8_TOKENS, ids=format_id)
def test_whole_numbers_of_tokens_are_bit_exact(fmt: NumberFormat):
    x = tokens(fmt.max).nan_to_num(posinf=6e4, neginf=-6e4)
    numbers, unit = triton_ops.quantize_rows(x, fmt.mantissa, fmt.min_exponent, fmt.max, torch.int8)
    simulated = Quantizer(fmt, PerChannel())
    scale = simulated.compute_qparams(x).scale
    assert numbers.dtype == torch.int8
    assert (numbers.float() * fmt.smallest * scale).equal(simulated(x))
    assert unit[:, None].equal(scale * fmt.smallest)


def test_nan_tokens_have_nan_scales():
    x = torch.ones(2, 16)
    x[0, 3] = torch.nan
    _, scale = triton_ops.quantize_rows(x, 3, -6, 448.0, E4M3_DTYPE)
    assert scale.isnan().tolist() == [True, False]
    x[1, 3] = torch.inf
    with np.errstate(invalid="ignore"):  # infinity over infinity
        numbers, unit = triton_ops.quantize_rows(x, 3, 0, 7.5, torch.int8)
    assert (numbers.float().sum(1) * unit).isnan().all()


def operands(m: int, n: int, k: int, group: int, bias: bool):
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator)
    codes = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scale = torch.rand(n, k // group, generator=generator) + 0.5
    return x, codes, scale, torch.randn(n, generator=generator) if bias else None


def dense(codes: torch.Tensor, shift: int, scale: torch.Tensor) -> torch.Tensor:
    """Return the weight in fp64. `expand_codes` is checked by packed/test_triton_kernels.py."""
    values = triton_ops.expand_codes(codes, shift).double()
    return (values.unflatten(1, (scale.shape[1], -1)) * scale.double()[..., None]).flatten(1)


def worst(y: torch.Tensor, reference: torch.Tensor) -> float:
    return (y.double() - reference).abs().max().item()


SHAPES = [  # m, n, k, group, bias
    (1, 70, 256, 128, True),
    (7, 64, 384, 384, False),
    (33, 100, 144, 144, True),  # a tail after the first step along K
    (150, 65, 256, 256, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp8_products_are_exact_up_to_fp32_sums(shape):
    x, codes, scale, bias = operands(*shape)
    values, x_scale = triton_ops.quantize_rows(x, 3, -6, 448.0, E4M3_DTYPE)
    y = triton_ops.quantized_matmul(values, x_scale, codes, 2, scale, bias, torch.float32)
    token, weight = values.double() * x_scale.double()[:, None], dense(codes, 2, scale)
    reference = token @ weight.T + (0 if bias is None else bias.double())
    in_bf16 = token.bfloat16() @ weight.bfloat16().T + (0 if bias is None else bias.bfloat16())
    assert y.shape == reference.shape
    assert worst(y, reference) < 1e-6 * reference.abs().max() < worst(in_bf16, reference)
    assert y.equal(
        triton_ops.quantized_matmul(values, x_scale, codes, 2, scale, bias, torch.float32)
    )
    half = triton_ops.quantized_matmul(values, x_scale, codes, 2, scale, bias, torch.float16)
    assert half.equal(y.half())


def multiply_in_order(numbers, unit, weight, scale, bias) -> torch.Tensor:
    """Multiply whole numbers in NumPy: sums in int64, all else in fp32, group after group."""
    groups = scale.shape[1]
    total = np.zeros((len(numbers), len(weight)), np.float32)
    x, w = (side.numpy().astype(np.int64) for side in (numbers, weight))
    for g, (a, b) in enumerate(zip(np.split(x, groups, 1), np.split(w, groups, 1), strict=True)):
        total = total + (a @ b.T).astype(np.float32) * scale[:, g].numpy()
    total = total * unit.numpy()[:, None]
    return torch.from_numpy(total if bias is None else total + bias.numpy())


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=format_id)
@pytest.mark.parametrize("shape", [*SHAPES, (5, 64, 512, 256, True)], ids=str)
def test_int8_products_are_exact(shape, fmt: NumberFormat):
    _, codes, scale, bias = operands(*shape)
    m, _, k, _, _ = shape
    numbers = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    unit, shift = torch.rand(m) + 0.5, 3 - min(fmt.mantissa, 2)
    magnitudes = fmt.values()[fmt.values() >= 0] / fmt.smallest
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
    weight = torch.cat([magnitudes, -magnitudes])[nibbles].to(torch.int8)
    y = triton_ops.quantized_matmul(numbers, unit, codes, shift, scale, bias, torch.float32)
    assert y.equal(multiply_in_order(numbers, unit, weight, scale, bias))


@pytest.mark.parametrize("group", [128, 384])
def test_every_tile_gives_the_same_bits(group: int, monkeypatch: pytest.MonkeyPatch):
    _, codes, scale, bias = operands(70, 130, 384, group, True)
    numbers, unit = torch.randint(-127, 128, (70, 384), dtype=torch.int8), torch.rand(70)
    products = []
    for tile in triton_ops.list_tiles(70, torch.int8):
        triton_ops.tune_kernel.cache_clear()
        monkeypatch.setattr(triton_ops, "list_tiles", lambda m, dtype, tile=tile: (tile,))
        products.append(
            triton_ops.quantized_matmul(numbers, unit, codes, 2, scale, bias, torch.float32)
        )
    triton_ops.tune_kernel.cache_clear()
    assert len(products) == 3
    assert products[0].equal(products[1])
    assert products[0].equal(products[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_only_products_are_exact_up_to_fp32_sums(shape, dtype: torch.dtype):
    x, codes, scale, bias = operands(*shape)
    x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    y = triton_ops.weight_only_matmul(x, codes, 1, scale, bias)
    weight = dense(codes, 1, scale)
    reference = x.double() @ weight.T + (0 if bias is None else bias.double())
    in_bf16 = x.bfloat16() @ weight.bfloat16().T + (0 if bias is None else bias.bfloat16())
    assert y.dtype == dtype
    if dtype == torch.float32:
        assert worst(y, reference) < 1e-6 * reference.abs().max()
    # Values stored in 16 bits are off by half a step. The interpreter truncates to bf16, which
    # costs up to a whole step.
    step = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 else 2)
    assert bool(
        (
            (y.double() - reference).abs() <= step * reference.abs() + 1e-6 * reference.abs().max()
        ).all()
    )
    assert dtype == torch.bfloat16 or worst(y, reference) <= worst(in_bf16, reference)


def test_operators_pass_opcheck():
    x, codes, scale, bias = operands(3, 16, 128, 128, True)
    values, x_scale = triton_ops.quantize_rows(x, 3, -6, 448.0, E4M3_DTYPE)
    for operator, arguments in [
        (triton_ops.quantize_rows, (x, 3, -6, 448.0, E4M3_DTYPE)),
        (triton_ops.quantized_matmul, (values, x_scale, codes, 2, scale, bias, x.dtype)),
        (triton_ops.quantize_rows, (x, 3, 0, 7.5, torch.int8)),
        (triton_ops.weight_only_matmul, (x, codes, 2, scale, bias)),
    ]:
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_operators_compile_into_one_graph():
    x, codes, scale, bias = operands(3, 16, 128, 128, True)

    def layer(x: torch.Tensor) -> torch.Tensor:
        values, x_scale = triton_ops.quantize_rows(x * 2, 3, -6, 448.0, E4M3_DTYPE)
        y = triton_ops.quantized_matmul(values, x_scale, codes, 2, scale, bias, torch.float32)
        return y.relu() + triton_ops.weight_only_matmul(x, codes, 2, scale, None)

    assert torch.compile(layer, fullgraph=True, backend="aot_eager")(x).equal(layer(x))


def make_packed_layer(fmt, granularity: Granularity, tokens) -> tuple[QuantLayer, PackedLinear]:
    torch.manual_seed(0)
    layer = QuantLayer(nn.Linear(256, 48), Quantizer(fmt, granularity, AbsMax(fp16)))
    layer.input_fake_quant = FakeQuantize(Quantizer(tokens, PerChannel()))
    layer.prepare().commit_weight()
    return layer, pack_layer(layer)


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS, ids=format_id)
@pytest.mark.parametrize("granularity", [PerGroup(128), PerChannel()], ids=["groups", "rows"])
def test_backends_equal_the_simulation(fmt, granularity: Granularity):
    """Compare with the exact product of the simulated weight and input, up to fp32 sums."""
    for tokens, special in ((E4M3, Fp8Backend()), (floating(2, 3), Int8Backend())):
        layer, packed = make_packed_layer(fmt, granularity, tokens)
        x = torch.randn(2, 3, 256)
        assert can_expand_codes(packed.layout, 256)
        inputs = layer.input_fake_quant(x).double()
        exact = F.linear(inputs, layer.weight_matrix.double(), layer.source.bias.double())
        for backend in (special, WeightOnlyBackend(), DequantizeBackend()):
            torch.testing.assert_close(
                backend(packed, x).double(), exact, rtol=0, atol=2e-6 * exact.abs().max().item()
            )


@pytest.mark.skipif(find_kernels() is None, reason="no kernels for this CPU")
@pytest.mark.parametrize("granularity", [PerGroup(128), PerChannel()], ids=["groups", "rows"])
def test_int8_products_have_the_bits_of_a_cpu(granularity: Granularity):
    _, packed = make_packed_layer(floating(2, 1), granularity, floating(2, 3))
    x = torch.randn(5, 256)
    with torch.no_grad():
        assert IntegerBackend().supports(packed, x)
        assert Int8Backend()(packed, x).equal(IntegerBackend()(packed, x))
