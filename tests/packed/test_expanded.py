"""Weights expanded to bytes: the products of `torch._int_mm` and `torch._scaled_mm` on a CPU."""

import subprocess
import sys
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

import fp4dit
from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.quantizer import Granularity, PerChannel, PerGroup, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn import token_quant
from fp4dit.packed.nn.backends import DequantizeBackend, choose_backend
from fp4dit.packed.nn.expanded_backend import ExpandedBackend, expand_layer_
from fp4dit.packed.nn.expanded_weight import ExpandedFp8, ExpandedInt8
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import make_quant_layer
from fp4dit.utils.errors import UserError

E2M1, E2M3, E3M4 = floating(2, 1), floating(2, 3), floating(3, 4)
GROUPS = PerGroup(128)


def name(fmt: NumberFormat) -> str:
    return fmt.name


def make_layer(
    fmt: NumberFormat, granularity: Granularity, tokens: NumberFormat, k: int = 384
) -> PackedLinear:
    torch.manual_seed(0)
    layer = make_quant_layer(nn.Linear(k, 48), Quantizer(fmt, granularity, AbsMax(fp16)))
    layer.prepare().commit_weight()
    packed = pack_layer(layer)
    packed.input_fake_quant = FakeQuantize(Quantizer(tokens, PerToken()))
    return packed.requires_grad_(False)


def multiply_in_order(layer: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    """Multiply whole numbers in NumPy: sums in int64, all else in fp32, group after group."""
    tokens, fmt = layer.input_fake_quant.quantizer, layer.layout.formats[0]
    qparams = tokens.compute_qparams(x)
    numbers = tokens.format.nearest(x / qparams.scale) / tokens.format.smallest
    scale = layer.qparams.scale.view(48, -1)
    weight = layer.dequantize(torch.float64).unflatten(1, (scale.shape[1], -1))
    weight = (weight / scale[..., None].double() / fmt.smallest).round()
    total = np.zeros((len(x), 48), np.float32)
    for g, part in enumerate(numbers.chunk(scale.shape[1], 1)):
        sums = part.numpy().astype(np.int64) @ weight[:, g].numpy().astype(np.int64).T
        total = total + sums.astype(np.float32) * (scale[:, g] * fmt.smallest).numpy()
    total = total * (qparams.scale * tokens.format.smallest).numpy()
    return torch.from_numpy(total + layer.bias.numpy())


@pytest.mark.parametrize("granularity", [GROUPS, PerGroup(192), PerChannel()], ids=str)
@pytest.mark.parametrize("tokens", [E2M3, E2M1, integer(4), integer(6), integer(8)], ids=name)
@pytest.mark.parametrize(
    "fmt", [E2M1, floating(1, 2), floating(3, 0), integer(4), integer(8), E2M3], ids=name
)
def test_int8_products_are_exact(fmt: NumberFormat, tokens: NumberFormat, granularity: Granularity):
    layer, x = make_layer(fmt, granularity, tokens), torch.randn(19, 384)
    assert expand_layer_(layer)
    assert isinstance(layer.expanded, ExpandedInt8)
    assert ExpandedBackend()(layer, x).equal(multiply_in_order(layer, x))


@pytest.mark.parametrize("granularity", [GROUPS, PerChannel()], ids=str)
@pytest.mark.parametrize("fmt", [E2M1, integer(4), E4M3], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_products_are_exact_up_to_fp32_sums(
    fmt: NumberFormat, granularity: Granularity, dtype: torch.dtype
):
    layer, x = make_layer(fmt, granularity, E4M3), torch.randn(2, 19, 384, dtype=dtype)
    weight = layer.dequantize(torch.float64)
    assert expand_layer_(layer.to(dtype))
    assert isinstance(layer.expanded, ExpandedFp8)
    exact = layer.input_fake_quant(x.float()).double() @ weight.T + layer.bias.double()
    # On a CPU oneDNN is right, and so slow that this backend is not chosen.
    assert not isinstance(choose_backend(layer, x), ExpandedBackend)
    y = ExpandedBackend()(layer, x)
    error = (y.double() - exact).abs()
    tolerance = 1e-6 * exact.abs().max()
    assert y.dtype == dtype
    assert (error <= tolerance + (exact.abs() * torch.finfo(dtype).eps / 2)).all()


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a machine without a C compiler, whose kernels are faster than oneDNN."""
    monkeypatch.setattr(token_quant, "find_kernels", lambda: None)


def test_the_expanded_weight_is_chosen_where_it_can_be(no_kernels: None):
    layer = make_layer(E2M1, GROUPS, E2M3)
    x = torch.randn(17, 384)
    before = choose_backend(layer, x)
    assert expand_layer_(layer)
    assert isinstance(choose_backend(layer, x), ExpandedBackend)
    assert type(choose_backend(layer, x[1:])) is type(before)  # `_int_mm` needs 17 rows on a GPU
    needed = x.clone().requires_grad_()
    assert isinstance(choose_backend(layer, needed), DequantizeBackend)
    layer.requires_grad_(False)
    layer(needed).sum().backward()
    assert needed.grad is not None


def test_tokens_of_nan_and_infinity(no_kernels: None):
    layer, x = make_layer(E2M1, GROUPS, E2M3), torch.randn(17, 384)
    expand_layer_(layer)
    expected = layer(x)
    x[3, 7], x[5, 7] = torch.nan, torch.inf
    is_nan = layer(x).isnan()
    assert is_nan[3].all()
    assert is_nan[5].all()
    assert is_nan.sum() == 2 * 48
    assert layer(x)[6:].equal(expected[6:])


def test_an_expanded_layer_is_cast_copied_and_saved(no_kernels: None):
    layer, x = make_layer(E2M1, GROUPS, E2M3), torch.randn(17, 384)
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    expand_layer_(layer)
    expected = layer(x)
    assert list(layer.state_dict()) == list(state)
    half = deepcopy(layer).half()
    assert half.expanded is not None
    assert half.expanded.unit.dtype == torch.float32
    torch.testing.assert_close(half(x).float(), expected, rtol=0, atol=1e-2)
    assert half(x.half()).dtype == torch.float16


def test_one_graph_for_a_compiler():
    """In a process of its own, because the tests' type checks cannot be compiled."""
    code = """
import torch
from tests.packed import test_expanded as t
layer, x = t.make_layer(t.E2M1, t.GROUPS, t.E2M3), torch.randn(17, 384)
assert t.expand_layer_(layer)
with torch.no_grad():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert compiled(x).equal(t.ExpandedBackend()(layer, x))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.mark.parametrize(
    ("fmt", "granularity", "tokens"),
    [
        (E2M1, PerGroup(16), E2M3),
        (E2M1, GROUPS, E3M4),  # neither int8 nor E4M3
        (E4M3, GROUPS, integer(8)),  # no numbers hold both
    ],
)
def test_other_layers_are_left(fmt: NumberFormat, granularity: Granularity, tokens: NumberFormat):
    layer = make_layer(fmt, granularity, tokens)
    assert not expand_layer_(layer)
    with pytest.raises(UserError, match="no weight of this model can be expanded"):
        fp4dit.expand_weights(layer)


def test_all_layers_of_a_model():
    layers = [make_layer(E2M1, GROUPS, tokens) for tokens in (E2M3, E4M3, E3M4)]
    assert fp4dit.expand_weights(nn.Sequential(*layers, nn.Linear(4, 4))) == 2
