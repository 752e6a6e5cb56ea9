"""A backend is chosen for each product with a packed weight."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.quantizer import PerGroup, PerToken, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn import backends, byte_numbers
from fp4dit.packed.nn.expanded_backend import expand_layer_
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer

SMALL_FORMATS = [floating(e, m) for e in range(1, 6) for m in range(6) if e + m < 8]


@pytest.fixture
def packed_layer() -> PackedLinear:
    """Pack a layer in E2M1 with groups of 128, which all backends support."""
    quantizer = Quantizer(floating(2, 1), PerGroup(128), AbsMax(fp16))
    quantized = QuantLayer(nn.Linear(256, 64), quantizer)
    quantized.prepare().commit_weight()
    return pack_layer(quantized)


def test_cpu_tensors_are_left_to_dequantize(packed_layer: PackedLinear):
    x = torch.zeros(2, 256)
    for backend in backends.BACKENDS:
        assert backend.supports(packed_layer, x) == (backend.name == "dequantize")
    assert isinstance(backends.choose_backend(packed_layer, x), backends.DequantizeBackend)
    assert isinstance(backends.choose_backend(packed_layer, x[:0]), backends.DequantizeBackend)


A100, ADA, H100, B200, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (7, 5)
E2M3, E3M4 = floating(2, 3), floating(3, 4)


@pytest.mark.parametrize(
    ("capability", "tokens", "rows", "expected"),
    [
        (A100, E2M3, 65, "int8"),
        (A100, E2M3, 64, "weight_only"),
        (A100, E2M3, 0, "weight_only"),
        (A100, E4M3, 65, "weight_only"),
        (ADA, integer(8), 65, "int8"),
        (ADA, E4M3, 65, "fp8"),
        (H100, E2M3, 65, "int8"),
        (H100, E4M3, 65, "fp8"),
        (H100, E3M4, 65, "weight_only"),
        (H100, None, 65, "weight_only"),
        (B200, E2M3, 65, "fp8"),
        (B200, integer(8), 65, "weight_only"),
        (TURING, E2M3, 65, "dequantize"),
    ],
)
def test_choice_on_a_gpu(
    packed_layer: PackedLinear,
    capability: tuple[int, int],
    tokens: NumberFormat | None,
    rows: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    """The table of docs/reference/checkpoint.md, with tensors of a GPU that is not there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if tokens is not None:
        packed_layer.input_fake_quant = FakeQuantize(Quantizer(tokens, PerToken()))
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(1, rows, 256, device="cuda")
        assert backends.choose_backend(packed_layer, x).name == expected


@pytest.mark.parametrize(
    ("capability", "tokens", "rows", "expected"),
    [
        (TURING, E2M3, 17, "expanded"),
        (TURING, E2M3, 16, "dequantize"),
        (A100, E4M3, 65, "weight_only"),
        (H100, E4M3, 17, "expanded"),
        (B200, E2M3, 65, "expanded"),
        ((10, 3), E2M3, 65, "fp8"),
    ],
)
def test_choice_of_an_expanded_weight_on_a_gpu(
    packed_layer: PackedLinear,
    capability: tuple[int, int],
    tokens: NumberFormat,
    rows: int,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packed_layer.input_fake_quant = FakeQuantize(Quantizer(tokens, PerToken()))
    assert expand_layer_(packed_layer)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(1, rows, 256, device="cuda")
        assert backends.choose_backend(packed_layer, x).name == expected


def test_autograd_sees_products_on_a_gpu(
    packed_layer: PackedLinear, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: A100)
    packed_layer.requires_grad_(False)
    with FakeTensorMode():
        x = torch.empty(65, 256, device="cuda", requires_grad=True)
        assert backends.choose_backend(packed_layer, x).name == "dequantize"
        assert backends.choose_backend(packed_layer, x.detach()).name == "weight_only"


@pytest.mark.parametrize("fmt", SMALL_FORMATS, ids=lambda fmt: fmt.name)
def test_formats_that_e4m3_holds(fmt: NumberFormat):
    assert byte_numbers.fits_e4m3(fmt) == bool(torch.isin(fmt.values(), E4M3.values()).all())


@pytest.mark.parametrize("fmt", [*SMALL_FORMATS, integer(8)], ids=lambda fmt: fmt.name)
def test_formats_that_int8_holds(fmt: NumberFormat):
    """The unit is the largest power of two that leaves no fraction."""
    numbers = fmt.values() / byte_numbers.INT8_NUMBERS.find_unit(fmt)
    assert numbers.equal(numbers.round())
    assert (numbers % 2 == 1).any()
    assert byte_numbers.fits_int8(fmt) == bool(numbers.abs().max() <= 127)
