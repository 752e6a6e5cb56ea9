"""A backend is chosen for each product with a packed weight."""

import pytest
import torch
from torch import nn

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat, floating, fp16
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.packed.nn import backends
from fp4dit.packed.nn.backends import DequantizeBackend, Fp8Backend, WeightOnlyBackend
from fp4dit.packed.nn.linear import PackedLinear, pack_layer
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
    assert isinstance(backends.choose_backend(packed_layer, x), DequantizeBackend)
    assert isinstance(backends.choose_backend(packed_layer, x[:0]), DequantizeBackend)


@pytest.mark.parametrize(
    ("rows", "expected"), [(0, WeightOnlyBackend), (64, WeightOnlyBackend), (65, Fp8Backend)]
)
def test_tensor_cores_are_for_many_rows(
    packed_layer: PackedLinear, rows: int, expected: type, monkeypatch: pytest.MonkeyPatch
):
    for backend in (Fp8Backend, WeightOnlyBackend):
        monkeypatch.setattr(backend, "supports", lambda self, packed_layer, x: True)
    assert type(backends.choose_backend(packed_layer, torch.zeros(1, rows, 256))) is expected


def test_a_backend_that_lacks_support_is_passed_over(
    packed_layer: PackedLinear, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(WeightOnlyBackend, "supports", lambda self, packed_layer, x: True)
    assert isinstance(
        backends.choose_backend(packed_layer, torch.zeros(99, 256)), WeightOnlyBackend
    )


@pytest.mark.parametrize("fmt", SMALL_FORMATS, ids=lambda fmt: fmt.name)
def test_formats_that_e4m3_holds(fmt: NumberFormat):
    assert backends.fits_e4m3(fmt) == bool(torch.isin(fmt.values(), E4M3.values()).all())
