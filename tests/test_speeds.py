"""Which way to multiply is taken, by what was measured."""

import logging

import pytest
import torch
from torch import nn

from fp4dit.blockscales import E4M3
from fp4dit.formats import floating, fp16
from fp4dit.layer import QuantLayer
from fp4dit.packed import matmul, speeds
from fp4dit.packed.layer import PackedLinear, packed
from fp4dit.packed.speeds import Speed
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax

CPU = speeds.device_name(torch.device("cpu"))


@pytest.fixture
def layer() -> PackedLinear:
    made = QuantLayer(nn.Linear(256, 64), Quantizer(floating(2, 1), Granularity("group", 128), AbsMax(fp16)))
    made.prepare()
    made.freeze()
    return packed(made)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch):
    """Puts speeds in place of those that come with the package."""

    def put(*found: Speed) -> None:
        monkeypatch.setattr(speeds, "measured", lambda: found)
        speeds.milliseconds.cache_clear()
        matmul.tell_slow.cache_clear()

    yield put
    speeds.milliseconds.cache_clear()
    matmul.tell_slow.cache_clear()


def test_time_is_that_of_the_shape_most_like_this_one(measured):
    measured(Speed("gpu", "fp8", 16, 1024, 1024, 1.0), Speed("gpu", "fp8", 8192, 1024, 1024, 64.0))
    assert speeds.milliseconds("gpu", "fp8", 16, 1024, 1024) == 1.0
    assert speeds.milliseconds("gpu", "fp8", 4096, 1024, 1024) == 32.0
    assert speeds.milliseconds("gpu", "dequantize", 16, 1024, 1024) is None


@pytest.mark.parametrize(("few", "many"), [(matmul.WeightOnly, matmul.Fp8), (matmul.Dequantize, matmul.WeightOnly)])
def test_the_fastest_for_so_many_rows_is_taken(measured, layer: PackedLinear, few: type, many: type):
    ways = [way() for way in (matmul.Fp8, matmul.WeightOnly, matmul.Dequantize)]
    rows = [(way, m, 1.0 if kind is type(way) else 2.0) for m, kind in ((4, few), (4096, many)) for way in ways]
    measured(*(Speed(CPU, way.name, m, 64, 256, ms * m) for way, m, ms in rows))
    assert type(matmul.fastest(ways, layer, torch.zeros(2, 3, 256))) is few
    assert type(matmul.fastest(ways, layer, torch.zeros(2, 2048, 256))) is many


def test_where_nobody_measured_tensor_cores_are_for_many_rows(measured, layer: PackedLinear):
    measured()
    ways = [way() for way in (matmul.Fp8, matmul.WeightOnly, matmul.Dequantize)]
    assert type(matmul.fastest(ways, layer, torch.zeros(4096, 256))) is matmul.Fp8
    assert type(matmul.fastest(ways, layer, torch.zeros(2, 256))) is matmul.WeightOnly


@pytest.mark.parametrize(("ms", "times"), [(2.0, 1), (1.0, 0)])
def test_what_is_slower_than_16_bits_says_so_once(measured, layer: PackedLinear, caplog, ms: float, times: int):
    measured(Speed(CPU, "dequantize", 16, 64, 256, ms), Speed(CPU, "16-bit", 16, 64, 256, 1.0))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            layer(torch.zeros(16, 256))
    assert sum("take longer than in 16 bits" in record.message for record in caplog.records) == times


def test_a_gpu_s_ways_do_not_take_a_cpu_s_tensors(layer: PackedLinear):
    x = torch.zeros(2, 256)
    assert [way.name for way in matmul.BACKENDS if way.takes(layer, x)] == ["dequantize"]


SMALL = [floating(e, m) for e in range(1, 6) for m in range(6) if e + m < 8]


@pytest.mark.parametrize("fmt", SMALL, ids=lambda fmt: fmt.name)
def test_which_formats_e4m3_holds(fmt):
    assert matmul.in_e4m3(fmt) == bool(torch.isin(fmt.values(), E4M3.values()).all())
