"""The forecast of the best 4-bit format, against what quantizers then leave of other weights."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fp4dit.analysis import (
    Distribution,
    GeneralizedNormal,
    StudentT,
    Uniform,
    expected_noise,
    measure_noise,
    to_decibels,
)
from fp4dit.analysis.forecast import FormatForecast
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, ELEMENTS, make_element_quantizers
from fp4dit.models.weight_files import WeightFiles
from fp4dit.numerics import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    Quantizer,
    parse_format,
)
from fp4dit.quantization.format_forecast import forecast_formats, forecast_from_module
from fp4dit.quantization.rules import Rule
from fp4dit.transforms import Hadamard

SHIPPED = "pkg://fp4dit/worlds/shapes/weights"


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """The weights of the shipped model's blocks, by layer."""
    files = WeightFiles.find(SHIPPED)
    assert files
    read = {}
    for key in files.file_of:
        name = key.removesuffix(".weight")
        if name.startswith("transformer_blocks") and (rows := files.read_rows(name)) is not None:
            read[name] = rows
    assert len(read) == 60
    return read


def forecast_of(weights: Mapping[str, Tensor], rule: Rule) -> FormatForecast:
    """Return the forecast for weights in files."""
    found = forecast_formats(
        {name: w.shape for name, w in weights.items()},
        [rule],
        lambda name, count: weights[name][:: max(1, len(weights[name]) // count)],
    )
    assert found
    return found


def e2m1(granularity: Granularity, **options) -> Rule:
    return Rule("*", Quantizer(parse_format("e2m1"), granularity), **options)


@pytest.mark.parametrize(
    "granularity", [PerGroup(16), PerGroup(128), PerChannel(), PerTensor()], ids=str
)
def test_the_forecast_comes_true_on_layers_that_were_held_out(
    weights: dict[str, Tensor], granularity: Granularity
):
    """A sample of every other layer of each kind tells what quantizers leave of all the others."""
    kinds = sorted({name.split(".", 2)[2] for name in weights})
    seen = {}
    for name, weight in weights.items():
        _, block, kind = name.split(".", 2)
        if (int(block) + kinds.index(kind)) % 2 == 0:
            seen[name] = weight
    assert len(seen) == 30
    forecast = forecast_of(seen, e2m1(granularity))
    quantizers = {**make_element_quantizers(granularity), **BLOCK_FORMATS}
    measured = {}
    for name in (*ELEMENTS, *forecast.own_blocks):
        noise = values = 0.0
        for layer in weights.keys() - seen.keys():
            w = weights[layer]
            noise += w.numel() * measure_noise(quantizers[name], w) / float(w.square().sum())
            values += w.numel()
        measured[name] = to_decibels(noise / values)
    # A scale of a whole tensor depends on its largest value, of which there are few.
    tolerance = 1.5 if isinstance(granularity, PerTensor) else 0.3
    for name, score in {**forecast.same_blocks, **forecast.own_blocks}.items():
        assert score.ratio == pytest.approx(measured[name], abs=tolerance), name
    best = max(ELEMENTS, key=measured.__getitem__)
    assert measured[best] - measured[forecast.winner] < tolerance / 2
    lead = measured[forecast.winner] - measured["e2m1"]
    assert forecast.lead == pytest.approx(lead, abs=tolerance / 2)


@pytest.mark.parametrize(
    ("distribution", "size", "winner"),
    [
        (Uniform(), 128, "uint4"),
        (GeneralizedNormal(2.0), 16, "uint4"),
        (GeneralizedNormal(2.0), 128, "nf4"),
        (StudentT(8.0), 1024, "nf4"),
    ],
    ids=str,
)
def test_the_forecast_is_what_integration_expects(
    distribution: Distribution, size: int, winner: str
):
    rng = np.random.default_rng(0)
    layers = {
        f"layer.{i}": torch.from_numpy(distribution.sample((256, 1024), rng)).float()
        for i in range(20)
    }
    forecast = forecast_of(layers, e2m1(PerGroup(size)))
    assert forecast.winner == winner
    for name, (fmt, rule) in ELEMENTS.items():
        expected = to_decibels(expected_noise(rule, fmt, distribution, size))
        assert forecast.same_blocks[name].ratio == pytest.approx(expected, abs=0.15), name


def test_the_bits_are_those_of_the_quantizers(weights: dict[str, Tensor]):
    forecast = forecast_of(weights, e2m1(PerGroup(128)))
    bits = {name: round(score.bits, 4) for name, score in forecast.same_blocks.items()}
    assert bits["e2m1"] == bits["int4"] == bits["nf4"] == 4.125
    assert bits["uint4"] == 4.1562
    assert forecast.method.bits == 4 + 32 / 128  # its scales are fp32 here
    assert forecast.own_blocks["mxfp4"].bits == 4.25


def test_a_rotation_of_the_method_is_applied(weights: dict[str, Tensor]):
    name = "transformer_blocks.0.ff.net.0.proj"  # whose groups have the longest tails
    layer = {name: weights[name]}
    plain = forecast_of(layer, e2m1(PerChannel()))
    rotated = forecast_of(layer, e2m1(PerChannel(), transforms=[Hadamard()]))
    turned = Hadamard()(1024, 256).transform_weight(weights[name])
    direct = forecast_of({name: turned}, e2m1(PerChannel()))
    assert rotated.same_blocks["int4"].ratio == pytest.approx(
        direct.same_blocks["int4"].ratio, abs=1e-3
    )
    assert rotated.same_blocks["int4"].ratio > plain.same_blocks["int4"].ratio + 0.5


def test_a_model_in_memory_has_the_forecast_of_its_files(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(256, 300), "b": nn.Conv2d(8, 32, 4)})
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    save_file(model.state_dict(), tmp_path / "transformer" / "model.safetensors")
    files = WeightFiles.find(str(tmp_path))
    assert files
    shapes = {"a": torch.Size([300, 256]), "b": torch.Size([32, 8, 4, 4])}
    rules = [e2m1(PerGroup(64))]
    forecast = forecast_formats(shapes, rules, files.read_rows)
    assert forecast
    assert forecast == forecast_from_module(model, rules)
    assert forecast.share == (64 * 256 + 32 * 128) / (300 * 256 + 32 * 128)


def test_without_weights_of_4_bits_there_is_no_forecast(tmp_path: Path):
    assert WeightFiles.find(str(tmp_path)) is None
    assert WeightFiles.find("PixArt-alpha/PixArt-XL-2-1024-MS") is None  # only its configs ship
    shapes = {"a": torch.Size([4, 128])}
    rule = e2m1(PerGroup(128))
    assert forecast_formats(shapes, [rule], lambda *_: None) is None
    wide = Rule("*", Quantizer(parse_format("int8"), PerGroup(128)))
    assert forecast_formats(shapes, [wide], lambda *_: torch.randn(4, 128)) is None
    with torch.device("meta"):
        assert forecast_from_module(nn.ModuleDict({"a": nn.Linear(128, 4)}), [rule]) is None
