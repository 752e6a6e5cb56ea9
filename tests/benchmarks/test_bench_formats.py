"""The page about FP4 and INT4: what its sentences say, and that its numbers are of this code."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import bench_formats, format_page
from benchmarks.format_curves import FAMILIES, ROW, TENSOR, Curve, Ratios
from benchmarks.format_layers import LayerNoise, measure_layer
from benchmarks.format_page import MEASURED
from fp4dit.analysis import (
    Distribution,
    GeneralizedNormal,
    StudentT,
    Uniform,
    expected_noise,
    to_decibels,
)
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, ELEMENTS
from fp4dit.models.weight_files import WeightFiles
from fp4dit.utils.errors import UserError
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "concepts" / "fp4-or-int4.md"

NORMAL, LAPLACE = GeneralizedNormal(2.0), GeneralizedNormal(1.0)
LONG = [LAPLACE, GeneralizedNormal(0.5), StudentT(5.0)]


def ratio(name: str, size: int, distribution: Distribution = NORMAL) -> float:
    fmt, rule = ELEMENTS[name]
    return to_decibels(expected_noise(rule, fmt, distribution, size))


# --- What the sentences say -----------------------------------------------------------------------


@pytest.mark.parametrize("distribution", [Uniform(), NORMAL, *LONG], ids=str)
def test_short_groups_are_for_integers_with_a_zero_point(distribution: Distribution):
    for size in (16, 32):
        assert ratio("uint4", size, distribution) > ratio("e2m1", size, distribution)


def test_groups_of_128_depend_on_the_tails():
    assert ratio("uint4", 128) > ratio("e2m1", 128) + 0.5
    for distribution in LONG:
        assert ratio("e2m1", 128, distribution) > ratio("uint4", 128, distribution)


def test_rows_and_tensors_are_for_floats_and_long_groups_without_a_zero_point_too():
    for size in (ROW, TENSOR):
        assert ratio("e2m1", size) > ratio("uint4", size) + 0.5
    for size in (64, 128, ROW, TENSOR):
        assert ratio("e2m1", size) > ratio("int4", size)
    assert ratio("int4", 16) > ratio("e2m1", 16)


@pytest.mark.parametrize("distribution", [Uniform(), NORMAL, *LONG], ids=str)
def test_e3m0_is_behind_e2m1_in_groups(distribution: Distribution):
    for size in (16, 128):
        assert ratio("e2m1", size, distribution) > ratio("e3m0", size, distribution) + 1
    if distribution in LONG:
        assert ratio("e3m0", TENSOR, distribution) > ratio("e2m1", TENSOR, distribution)


# --- The numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["INT4, symmetric", "E2M1", "E3M0"])
def test_the_page_has_the_ratios_of_normal_values(name: str):
    word = {"INT4, symmetric": "int4", "E2M1": "e2m1", "E3M0": "e3m0"}[name]
    sizes = (16, 32, 64, 128, ROW, TENSOR)
    row = f"| {name} | {' | '.join(f'{ratio(word, size):.1f}' for size in sizes)} |"
    text = PAGE.read_text().replace("**", "")
    assert row in text[text.index("| normal |") : text.index("| Laplace")]


def test_the_page_has_the_ratios_of_a_layer():
    name = "transformer_blocks.0.ff.net.0.proj"
    files = WeightFiles.find("pkg://fp4dit/worlds/shapes/weights")
    assert files
    weight = files.read_rows(name)
    assert weight is not None
    layer = measure_layer(name, weight, rotate=False)
    cells = [f"{layer.kurtosis[size]:.2f}" for size in (128, ROW, TENSOR)]
    cells += [f"{layer.ratios[word, 128]:.1f}" for word in MEASURED]
    [row] = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert f"| `{name}` | 1024x256 | {' | '.join(cells)} |" in row


# --- The command ----------------------------------------------------------------------------------


def make_ratios(distribution: Distribution, *_) -> Ratios:
    """Return ratios that cost nothing, and by which formats change places."""
    keys = [(name, size) for name in ELEMENTS for size in (16, 32, 64, 128, ROW, TENSOR)]
    keys += [(name, q.granularity.width(torch.Size([4, 128]))) for name, q in BLOCK_FORMATS.items()]
    kurtosis = min(distribution.kurtosis, 30)
    return {key: 20.0 - ("int" in key[0]) * (kurtosis - 1) for key in keys}


@pytest.mark.unchecked
def test_the_command_places_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def compute_curves() -> dict[str, Curve]:
        curves = {}
        for family, members in FAMILIES.items():
            ratios = [make_ratios(member) for member in members]
            curves[family] = Curve([member.kurtosis for member in members], ratios)
        return curves

    def measure(path: str) -> list[LayerNoise]:
        torch.manual_seed(0)
        name = "blocks.3.long" if path == "/a/model" else "blocks.1.short"
        return [measure_layer(name, torch.randn(8, 256))]

    monkeypatch.setattr(bench_formats, "compute_curves", compute_curves)
    monkeypatch.setattr(bench_formats, "measure_model", measure)
    monkeypatch.setattr(format_page, "compute_ratios", make_ratios)
    bench_formats.main(["--model", "/a/model", "--out", str(tmp_path)])
    page = (tmp_path / "concepts" / "fp4-or-int4.md").read_text()
    assert "**Model**, 1 layers" in page
    assert "| `blocks.long` | 1 |" in page
    assert "{" not in page
    for name in ("fp4-or-int4", "4-bit-formats"):
        root = ElementTree.parse(tmp_path / "assets" / f"{name}.svg").getroot()
        assert root.tag.endswith("svg")
    dots = (tmp_path / "assets" / "fp4-or-int4.svg").read_text()
    assert dots.count("<title>model: blocks.3.long, 16</title>") == 2
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_model_without_weights_is_refused():
    with pytest.raises(UserError, match="no safetensors of a transformer on this machine"):
        bench_formats.measure_model("PixArt-alpha/PixArt-XL-2-1024-MS")


def test_a_crossing_is_where_lines_cross():
    points = [(0.0, 1.0), (1.0, 3.0)]
    ratios: list[Ratios] = [{("e2m1", 16): r, ("int4", 16): 2.0} for _, r in points]
    curve = Curve([k for k, _ in points], ratios)
    assert curve.find_crossing("e2m1", "int4", 16) == 0.5
    assert curve.find_crossing("int4", "e2m1", 16) == -float("inf")
    assert curve.predict("e2m1", 16, 0.25) == 1.5
