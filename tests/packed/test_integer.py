"""Products in whole numbers equal a computation in NumPy to the bit, and the simulation closely."""

import itertools
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fp4dit.numerics.block_scales import E4M3, E8M0Scale, NVFP4Scale
from fp4dit.numerics.format_selection import FormatSelection, LeastError, PerBlockFormat
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer, nf4
from fp4dit.numerics.qparams import Affine, Scale
from fp4dit.numerics.quantizer import (
    PerChannel,
    PerGroup,
    PerInputChannel,
    PerTensor,
    PerToken,
    Quantizer,
)
from fp4dit.numerics.scale_rules import AbsMax, MinMax, OffsetRange, TwoSidedAbsMax
from fp4dit.numerics.scale_search import PreShift
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.packed.export import pack_transformer_
from fp4dit.packed.integer_inference import use_integer_arithmetic_
from fp4dit.packed.nn import kernels
from fp4dit.packed.nn.backends import DequantizeBackend, IntegerBackend, choose_backend
from fp4dit.packed.nn.integer_operands import IntegerTokens, IntegerWeight, find_integer_grid
from fp4dit.packed.nn.integer_ops import choose_segment, find_segment, multiply_integers
from fp4dit.packed.nn.integer_weight import describe_weight
from fp4dit.packed.nn.kernels import find_kernels
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.packed.nn.token_quant import CachedFakeQuantize, find_token_grid, quantize_to_grid
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from tests.conftest import Compose
from tests.packed.test_export import (
    METHODS,
    block_folder,  # noqa: F401 (a fixture)
    quantize_by_preset,
    run_transformer,
)

pytestmark = pytest.mark.skipif(
    find_kernels() is None, reason="no kernels were compiled, or this processor cannot run them"
)

E2M1, INT8, UINT8 = floating(2, 1), integer(8), integer(8, signed=False)
ANY_FP4 = FormatSelection([floating(3, 0), E2M1, floating(1, 2)], LeastError(), per="block")
IF4 = FormatSelection([E2M1, integer(4)], LeastError(), per="block")
FOUR_OVER_SIX = NVFP4Scale(top=256.0, candidates=(1.0, 1.5))
TOKEN_ROW = Quantizer(floating(2, 3), PerToken())

WEIGHTS = {
    "e2m1_row_fp32": Quantizer(E2M1, PerChannel()),
    "e2m1_g128_fp16": Quantizer(E2M1, PerGroup(128), AbsMax(fp16)),
    "e2m1_tensor": Quantizer(E2M1, PerTensor()),
    "e1m2_g4": Quantizer(floating(1, 2), PerGroup(4), AbsMax(fp16)),
    "e3m0_g20": Quantizer(floating(3, 0), PerGroup(20), AbsMax(fp16)),
    "int4_row": Quantizer(integer(4), PerChannel(), AbsMax(fp16)),
    "uint4_row": Quantizer(integer(4, signed=False), PerChannel(), MinMax(fp16)),
    "uint4_g64": Quantizer(integer(4, signed=False), PerGroup(64), MinMax()),
    "uint4_tensor": Quantizer(integer(4, signed=False), PerTensor(), MinMax()),
    "ue2m2_g16_zero": Quantizer(floating(2, 2, signed=False), PerGroup(16), MinMax()),
    "int8_row": Quantizer(INT8, PerChannel()),
    "e1m6_row": Quantizer(floating(1, 6), PerChannel()),
    "int8_g12": Quantizer(INT8, PerGroup(12), AbsMax(fp16)),
    "nvfp4": Quantizer(E2M1, PerGroup(16), NVFP4Scale()),
    "mxfp4": Quantizer(E2M1, PerGroup(32), E8M0Scale()),
    "mxfp4_factor": Quantizer(E2M1, PerGroup(32), E8M0Scale(factor=4 / 3)),
    "chosen_nvfp4": Quantizer(ANY_FP4, PerGroup(16), NVFP4Scale()),
    "chosen_fp16": Quantizer(ANY_FP4, PerGroup(4), AbsMax(fp16)),
    "if4": Quantizer(IF4, PerGroup(16), NVFP4Scale()),
}
TOKENS = {
    "e2m3_token": TOKEN_ROW,
    "e2m1_nvfp4": Quantizer(E2M1, PerGroup(16), NVFP4Scale()),
    "e2m1_4over6": Quantizer(E2M1, PerGroup(16), FOUR_OVER_SIX),
    "e2m1_mx": Quantizer(E2M1, PerGroup(32), E8M0Scale()),
    "int4_g64_fp16": Quantizer(integer(4), PerGroup(64), AbsMax(fp16)),
    "int6_g128": Quantizer(integer(6), PerGroup(128)),
    "int8_token": Quantizer(INT8, PerToken()),
    "int8_tensor": Quantizer(INT8, PerTensor()),
    "uint8_token": Quantizer(UINT8, PerToken(), MinMax()),
    "uint8_g32": Quantizer(UINT8, PerGroup(32), MinMax()),
    "e3m4_token": Quantizer(floating(3, 4), PerToken()),
    "e3m4_zero": Quantizer(floating(3, 4), PerToken(), MinMax()),
    "e4m3_token": Quantizer(E4M3, PerToken()),
    "e4m3_g4": Quantizer(E4M3, PerGroup(4)),
    "int8_static": Quantizer(INT8, PerTensor()),
    "uint8_static": Quantizer(UINT8, PerTensor(), MinMax()),
}
ROWS, COLUMNS, OUTPUTS = (1, 5, 13, 45), (16, 20, 36, 48, 128, 260), (1, 63, 64, 65, 100)


def fits(quantizer: Quantizer, k: int) -> bool:
    size = getattr(quantizer.granularity, "size", 1)
    return k % size == 0


def make_tokens(quantizer: Quantizer, static: bool) -> FakeQuantize:
    """Return a quantizer of tokens, calibrated if it is static."""
    fake_quant = FakeQuantize(quantizer, static=static)
    if static:
        fake_quant.calibrate(torch.randn(9, 16).mul(3).sub(1))
    return fake_quant


def make_layer(quantizer: Quantizer, k: int, n: int, bias: bool = True) -> QuantLayer:
    """Return a layer with a rounded random weight."""
    layer = QuantLayer(nn.Linear(k, n, bias), quantizer)
    layer.prepare().commit_weight()
    return layer


@cache
def list_layers(name: str) -> list[tuple[QuantLayer, IntegerWeight]]:
    """Return layers of all widths that a format of weights fits, and their packed weights."""
    torch.manual_seed(0)
    layers = []
    outputs = itertools.cycle(OUTPUTS)
    for k in COLUMNS:
        if fits(WEIGHTS[name], k):
            layer = make_layer(WEIGHTS[name], k, next(outputs))
            packed = pack_layer(layer)
            weight = describe_weight(packed.layout, packed.packed_buffers, k)
            assert weight is not None
            layers.append((layer, weight))
    return layers


def read_grid(qparams: Scale | Affine, fmt: NumberFormat | PerBlockFormat, blocks: torch.Tensor):
    """Return the whole numbers of blocks in int64, and their scales in fp32."""
    smallest = torch.tensor([[fmt.smallest]] if isinstance(fmt, NumberFormat) else 0.0)
    if isinstance(fmt, PerBlockFormat):
        smallest = fmt.per_block_value([f.smallest for f in fmt.formats])
    grid = fmt.nearest(qparams.to_grid(blocks))
    zero = qparams.zero if isinstance(qparams, Affine) else 0.0
    numbers = (grid - zero) / smallest
    assert numbers.equal(numbers.round())
    scale = (qparams.scale * smallest).expand(len(blocks), 1)
    return numbers.long().numpy(), scale.numpy()


def read_tokens(fake_quant: FakeQuantize, x: torch.Tensor):
    """Return the whole numbers and scales that the simulation gives tokens."""
    quantizer, k = fake_quant.quantizer, x.shape[1]
    qparams = fake_quant.qparams if fake_quant.static else quantizer.compute_qparams(x)
    width = min(quantizer.granularity.width(x.shape), k)
    numbers, scale = read_grid(qparams, fake_quant.format, x.float().view(-1, width))
    return numbers.reshape(len(x), k), scale.reshape(len(x), -1)


def read_weight(layer: QuantLayer):
    """Return the whole numbers and scales of a weight, from the quantizer that rounded it."""
    fake_quant, (n, k) = layer.weight_fake_quant, layer.weight.shape
    width = min(fake_quant.quantizer.granularity.width(layer.weight.shape), k)
    blocks = layer.weight.detach().float().view(-1, width)
    numbers, scale = read_grid(fake_quant.qparams, fake_quant.format, blocks)
    return numbers.reshape(n, k), scale.reshape(n, -1)


def multiply_in_numpy(tokens, weight, segment: int) -> np.ndarray:
    """Multiply in int64, then round to fp32 what the kernels round, in their order."""
    (x, x_scale), (w, w_scale) = tokens, weight
    total = np.zeros((len(x), len(w)), np.float32)
    for start in range(0, x.shape[1], segment):
        part = slice(start, start + segment)
        sums = x[:, part] @ w[:, part].T
        assert np.abs(sums).max() < 2**31
        scale = w_scale[None, :, start * w_scale.shape[1] // w.shape[1]]
        if x_scale.shape[1] > 1:
            scale = scale * x_scale[:, start * x_scale.shape[1] // x.shape[1], None]
        fused = sums.astype(np.float32).astype(np.longdouble) * scale + total  # rounded once
        total = fused.astype(np.float32)
    return total * x_scale if x_scale.shape[1] == 1 else total


def list_kernels(weight: IntegerWeight) -> list[int]:
    """Return the kernels of this machine that may multiply by a weight."""
    limits = require(find_kernels()).limits
    return [number for number, limit in limits.items() if weight.largest <= limit]


def require(value):
    assert value is not None
    return value


def quantize(fake_quant: FakeQuantize, x: torch.Tensor) -> IntegerTokens:
    return quantize_to_grid(fake_quant, x, require(find_token_grid(fake_quant, x.shape[1])))


def read_numbers(tokens: IntegerTokens) -> np.ndarray:
    """Return the whole numbers that planes of bytes hold."""
    planes, m, k = tokens.numbers.shape
    powers = 256 ** torch.arange(planes).flip(0)
    numbers = (
        (tokens.numbers.long() * powers.view(-1, 1, 1)).sum(0).view(m, tokens.scale.shape[1], -1)
    )
    zero = tokens.grid.offset if tokens.zero is None else tokens.zero.long()[..., None]
    return (numbers - zero).view(m, k).numpy()


@pytest.mark.parametrize("name", WEIGHTS)
def test_kernels_equal_numpy(name: str):
    """Cycle through numbers of rows, and dtypes of inputs and outputs."""
    dtypes = (torch.float32, torch.bfloat16)
    variants = itertools.cycle(itertools.product(ROWS, dtypes, dtypes, (True, False)))
    for (layer, weight), (token_name, quantizer) in itertools.product(
        list_layers(name), TOKENS.items()
    ):
        if not fits(quantizer, layer.reduction_size):
            continue
        m, x_dtype, dtype, has_bias = next(variants)
        fake_quant = make_tokens(quantizer, "static" in token_name)
        x = torch.randn(m, layer.reduction_size).mul(torch.randn(m, 1).exp()).to(x_dtype)
        tokens = quantize(fake_quant, x)
        segment = choose_segment(tokens, weight)
        assert segment is not None
        expected = multiply_in_numpy(read_tokens(fake_quant, x), read_weight(layer), segment)
        expected, bias = torch.from_numpy(expected), None
        if has_bias:
            bias = require(layer.bias).detach().to(dtype)
            expected += bias.float()
        for kernel in list_kernels(weight):
            y = multiply_integers(tokens, weight, bias, dtype, kernel)
            assert y.equal(expected.to(dtype)), (token_name, m, weight.shape, kernel)


def list_hard_tokens(fmt: NumberFormat) -> torch.Tensor:
    """Return tokens of 128 values: ties, tiny and huge ones, zeros, and equal errors."""
    values = fmt.values()
    ties = torch.cat([values, (values[1:] + values[:-1]) / 2])
    ties = torch.cat([ties, ties.flip(0)]).repeat(128)[: len(ties) // 128 * 128 + 256].view(-1, 128)
    rows = [ties * scale for scale in (1.0, 0.37, 2.0**-20)]
    noise = torch.randn(40, 128)
    rows += [noise * scale for scale in (1.0, 1e-30, 1e30, 1e-38, 1e-42)]
    rows += [
        noise.mul(2).round(),
        noise.round() * 3,
        torch.zeros(2, 128),
        torch.full((2, 128), 3e38),
    ]
    rows.append(noise.masked_fill(noise.abs() < 2, 0))
    return torch.cat(rows)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_values_are_those_of_the_quantizer(name: str, dtype: torch.dtype):
    fake_quant = make_tokens(TOKENS[name], "static" in name)
    x = list_hard_tokens(TOKENS[name].format).to(dtype)
    if isinstance(TOKENS[name].granularity, PerTensor) or "nv" in name or "over" in name:
        x = x.masked_fill(x.abs() > 1e20, 1)  # beside which all others would be zeros
    numbers, scale = read_tokens(fake_quant, x)
    tokens = quantize(fake_quant, x)
    np.testing.assert_array_equal(tokens.scale.numpy(), scale)
    np.testing.assert_array_equal(read_numbers(tokens), numbers)
    if not fake_quant.static:
        with torch.no_grad():
            values = CachedFakeQuantize(TOKENS[name])(x)
        assert values.dtype == dtype
        assert values.equal(TOKENS[name](x))


def test_scales_of_about_equal_errors():
    """The kernel sums errors up in another order, and must leave such blocks to the quantizer.

    Bisect between blocks whose largest value lands on 6 and others whose largest value lands on 4.
    """
    rule = replace(FOUR_OVER_SIX, amax=6 * 256.0)
    low, high = torch.randn(2, 20000, 16)
    low[:, 0] = high[:, 0] = 5.0

    def lands_on_four(x: torch.Tensor) -> torch.Tensor:
        errors = []
        for ratio in rule.candidates:
            values = Quantizer(E2M1, PerGroup(16), replace(rule, candidates=(ratio,)))(x)
            errors.append((values - x).double().square().sum(1))
        return errors[1] < errors[0]

    keep = ~lands_on_four(low) & lands_on_four(high)
    low, high = low[keep], high[keep]
    for _ in range(25):
        middle = low + (high - low) / 2
        moved = lands_on_four(middle)[:, None]
        low, high = torch.where(moved, low, middle), torch.where(moved, middle, high)
    assert len(low) > 500
    quantizer, x = Quantizer(E2M1, PerGroup(16), rule), torch.cat([low, high])
    with torch.no_grad():
        assert CachedFakeQuantize(quantizer)(x).equal(quantizer(x))
    tokens = quantize(FakeQuantize(quantizer), x)
    numbers, scale = read_tokens(FakeQuantize(quantizer), x)
    np.testing.assert_array_equal(tokens.scale.numpy(), scale)
    np.testing.assert_array_equal(read_numbers(tokens), numbers)


def test_views_are_quantized_in_place_of_their_copies():
    x = torch.randn(3, 5, 2, 32)
    for view in (x.transpose(1, 2), x.transpose(2, 3), x[:, ::2], x[:0]):
        quantizer = Quantizer(E2M1, PerGroup(view.shape[-1]), AbsMax(fp16))
        with torch.no_grad():
            assert CachedFakeQuantize(quantizer)(view).equal(quantizer(view))


def test_slices_of_wider_tokens_are_quantized_as_their_copies():
    """Some models split a projection, so that a token's values are not followed by the next's."""
    wide = torch.randn(1, 30, 64)
    for part in (wide[..., :32], wide[0, :, 32:]):
        fake_quant = FakeQuantize(Quantizer(E2M1, PerGroup(16), AbsMax(fp16)))
        grid = require(find_token_grid(fake_quant, 32))
        with torch.no_grad():
            tokens = quantize_to_grid(fake_quant, part, grid)
            copies = quantize_to_grid(fake_quant, part.contiguous(), grid)
            assert CachedFakeQuantize(fake_quant.quantizer)(part).equal(fake_quant(part))
        assert tokens.numbers.equal(copies.numbers)
        assert tokens.scale.equal(copies.scale)


@pytest.mark.parametrize("name", TOKENS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(name: str, value: float):
    """Compare with the simulation, where infinity may saturate."""
    packed = pack_layer(make_layer(WEIGHTS["e2m1_row_fp32"], 128, 65))
    packed.input_fake_quant = make_tokens(TOKENS[name], "static" in name)
    x = torch.randn(13, 128)
    x[3, 40] = value
    assert IntegerBackend().supports(packed, x)
    y, expected = IntegerBackend()(packed, x), DequantizeBackend()(packed, x)
    assert y.isfinite().equal(expected.isfinite())
    assert y.isnan().equal(expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    if name in ("e2m3_token", "int8_token", "e4m3_token", "uint8_token", "e2m1_mx"):
        assert y.isnan().any(1).nonzero().flatten().tolist() == [3]
        assert y[3].isnan().all()
    if "static" in name and not math.isnan(value):
        assert y.isfinite().all()


def test_bits_do_not_depend_on_threads_or_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "MULTIPLICATIONS_PER_THREAD", 1)
    packed = pack_layer(make_layer(WEIGHTS["nvfp4"], 128, 400))
    packed.input_fake_quant = make_tokens(TOKENS["e3m4_token"], False)
    x, products = torch.randn(13, 128), []
    before = torch.get_num_threads()
    names = require(find_kernels()).names.values()
    for name, threads in itertools.product(names, (1, 2, 3, 5)):
        monkeypatch.setenv("FP4DIT_KERNEL", name)
        find_kernels.cache_clear()
        torch.set_num_threads(threads)
        products.append(IntegerBackend()(packed, x))
    torch.set_num_threads(before)
    find_kernels.cache_clear()
    assert all(product.equal(products[0]) for product in products)


def per_group(fmt, size: int = 16, scale=None) -> Quantizer:
    return Quantizer(fmt, PerGroup(size), scale or AbsMax())


@pytest.mark.parametrize(
    ("weight", "tokens"),
    [
        (per_group(nf4), TOKEN_ROW),
        (per_group(E2M1, scale=TwoSidedAbsMax()), TOKEN_ROW),
        (per_group(SharedMantissa(floating(2, 2), 4)), TOKEN_ROW),
        (per_group(E2M1, 6), TOKEN_ROW),
        (per_group(floating(2, 3)), TOKEN_ROW),  # codes of 6 bits
        (per_group(E4M3), TOKEN_ROW),
        (per_group(floating(1, 6, reserved=1)), TOKEN_ROW),  # a code without a value
        (per_group(UINT8, scale=MinMax()), TOKEN_ROW),
        (per_group(integer(4), scale=MinMax()), TOKEN_ROW),  # zero points below 0
        (per_group(floating(2, 2, signed=False), scale=OffsetRange()), TOKEN_ROW),
        (Quantizer(INT8, PerChannel()), Quantizer(integer(24), PerToken())),  # sums overflow
        (per_group(E2M1), None),
        (per_group(E2M1), Quantizer(nf4, PerToken())),
        (per_group(E2M1), Quantizer(fp16, PerToken())),
        (per_group(E2M1), per_group(INT8, 6)),
        (per_group(E2M1), Quantizer(INT8, PerToken(), TwoSidedAbsMax())),
        (per_group(E2M1), Quantizer(floating(3, 1, signed=False), PerToken(), OffsetRange())),
        (per_group(E2M1), Quantizer(ANY_FP4, PerGroup(16))),
        (per_group(E2M1), Quantizer(E2M1, PerInputChannel(), PreShift())),
        (per_group(E2M1), Quantizer(E2M1, PerToken(), PreShift())),
    ],
    ids=lambda quantizer: getattr(getattr(quantizer, "format", None), "name", "none"),
)
def test_other_products_are_left_to_dequantize(weight: Quantizer, tokens: Quantizer | None):
    packed, x = pack_layer(make_layer(weight, 48, 20)), torch.randn(5, 48)
    if tokens is not None:
        packed.input_fake_quant = FakeQuantize(tokens)
    assert not IntegerBackend().supports(packed, x)
    assert isinstance(choose_backend(packed, x), DequantizeBackend)
    assert packed(x).equal(DequantizeBackend()(packed, x))


def test_inputs_that_kernels_cannot_read():
    packed = pack_layer(make_layer(WEIGHTS["nvfp4"], 48, 20))
    packed.input_fake_quant = FakeQuantize(TOKEN_ROW)
    x = torch.randn(5, 48)
    assert IntegerBackend().supports(packed, x)
    for other in (x.half(), x.bfloat16(), x.double(), x.clone().requires_grad_(), x.to("meta")):
        assert not IntegerBackend().supports(packed, other)  # its bias is in fp32, too
    packed.input_fake_quant = FakeQuantize(TOKEN_ROW, static=True)  # not calibrated yet
    assert not IntegerBackend().supports(packed, x)


def test_a_bias_that_learns_gets_its_gradient():
    layer = pack_layer(make_layer(per_group(E2M1), 48, 20))
    layer.input_fake_quant = make_tokens(TOKEN_ROW, static=False)
    layer.bias.requires_grad_()
    layer(torch.randn(3, 48)).sum().backward()
    assert layer.bias.grad.equal(torch.full((20,), 3.0))
    with torch.no_grad():
        assert IntegerBackend().supports(layer, torch.randn(3, 48))


def test_a_layer_that_cannot_be_packed_stays_simulated():
    wide = make_layer(per_group(integer(12)), 48, 20)
    wide.input_fake_quant = make_tokens(TOKEN_ROW, static=False)
    model = nn.Sequential(wide)
    assert use_integer_arithmetic_(model) == 0
    assert model[0] is wide


def test_segments():
    e4m3, int8 = require(find_integer_grid(E4M3)), require(find_integer_grid(INT8))
    assert (e4m3.largest, e4m3.planes, int8.largest, int8.planes) == (448 * 2**9, 3, 127, 1)
    assert find_segment(int8, 128, 96, 127) == 32
    assert find_segment(e4m3, 128, 128, 12) == 128
    assert find_segment(e4m3, 128, 128, 127) == 64  # 2^31 / 448 / 2^9 / 127 is 73.7
    assert find_segment(e4m3, 260, 260, 127) == 52
    assert find_segment(int8, 18, 6, 127) is None
    assert find_segment(require(find_integer_grid(integer(24))), 8, 8, 127) is None


def test_zero_points_of_signed_tokens_do_not_overflow():
    """A number less its zero point may be twice the largest number: here 2 * 448 * 2^9."""
    layer = QuantLayer(nn.Linear(1024, 8, bias=False), WEIGHTS["e2m1_row_fp32"])
    layer.weight.data.fill_(0.5)
    layer.prepare().commit_weight()
    packed = pack_layer(layer)
    packed.input_fake_quant = FakeQuantize(Quantizer(E4M3, PerToken(), MinMax()))
    x = torch.full((2, 1024), 3.0)
    torch.testing.assert_close(packed(x), DequantizeBackend()(packed, x))


def test_integer_arithmetic_in_a_model():
    """A layer that cannot be computed in whole numbers stays simulated, with a shared quantizer."""
    weights = (WEIGHTS["nvfp4"], per_group(nf4), WEIGHTS["nvfp4"], WEIGHTS["nvfp4"])
    model = nn.Sequential(*[make_layer(weight, 48, 48) for weight in weights])
    model[0].input_fake_quant = FakeQuantize(TOKEN_ROW)
    model[1].input_fake_quant = FakeQuantize(TOKEN_ROW)
    model[2].input_fake_quant = make_tokens(TOKENS["int8_static"], True)
    x = torch.randn(7, 48)
    with torch.no_grad():
        before = model(x)
        assert use_integer_arithmetic_(model) == 2
        torch.testing.assert_close(model(x), before)
    kinds = [type(layer) for layer in model]
    assert kinds == [PackedLinear, QuantLayer, PackedLinear, QuantLayer]
    assert isinstance(model[0].input_fake_quant, CachedFakeQuantize)
    assert model[0].input_fake_quant is model[1].input_fake_quant
    assert model[2].input_fake_quant.static
    assert use_integer_arithmetic_(model) == 0  # nothing is left


def test_without_kernels_a_model_stays_as_it_is(no_kernels: None):
    model = nn.Sequential(make_layer(WEIGHTS["nvfp4"], 48, 48))
    model[0].input_fake_quant = FakeQuantize(TOKEN_ROW)
    assert use_integer_arithmetic_(model) == 0
    assert isinstance(model[0], QuantLayer)


# The layers of these presets that are computed in whole numbers, of 17.
LAYERS = dict.fromkeys(["fp4dit", "mxfp4_rtn", "nvfp4_4over6", "rtn", "smoothquant"], 17)
LAYERS |= dict.fromkeys(["afpq", "ams_fp4_25", "gptq", "mxfp8_rtn"], 0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.unchecked
def test_packed_presets_are_close_to_simulated_ones(
    composed: Compose,
    block_folder: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    method: str,
):
    """Compare each layer for the same input.

    The output of the transformer may differ more, because the least difference may decide how a
    value of the next layer is rounded.
    """
    block = quantize_by_preset(composed, block_folder, method)
    calls, hooks = {}, []
    for name, layer in block.dit.named_modules():
        if isinstance(layer, QuantLayer):
            keep = lambda layer, inputs, y, name=name: calls.update({name: (inputs[0].clone(), y)})
            hooks.append(layer.register_forward_hook(keep))
    before = run_transformer(block.dit)
    for hook in hooks:
        hook.remove()
    pack_transformer_(block.dit, block.weight, block.activation)
    used, multiply = set(), IntegerBackend.__call__
    monkeypatch.setattr(
        IntegerBackend, "__call__", lambda *call: used.add(call[1]) or multiply(*call)
    )
    for name, (x, y) in calls.items():
        with torch.no_grad():
            assert relative_error(block.dit.get_submodule(name)(x), y) < 1e-6, name
    assert len(used) == LAYERS.get(method, len(used))
    assert relative_error(run_transformer(block.dit), before) < 2e-3


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return float((x - expected).double().norm() / expected.double().norm())
