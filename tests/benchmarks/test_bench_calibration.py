"""The benchmarks of calibration and of full precision, with few calls of the shipped model."""

import sys
from pathlib import Path

import pytest

from benchmarks import calibration_images, full_precision
from benchmarks.bench_calibration import REQUIREMENTS, SIDES, Scale, report

pytestmark = pytest.mark.unchecked


def run_here(part, *arguments):
    return part(*arguments)


def test_report_calibration_names_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("benchmarks.bench_calibration.find_spec", lambda _: None)
    scale = Scale(block=0, prompts=(2, 1), sampler=3, steps=3, turns=1)
    lines = list(report(scale, str(tmp_path), run=run_here))
    rows = [line.strip("| ").split(" | ") for line in lines if ": fp4dit" in line]
    errors = {label.removesuffix(": fp4dit"): float(error) for label, *_, error in rows}
    assert list(errors) == list(SIDES)
    assert errors["GPTQ, largest activations first"] < errors["GPTQ"] < errors["nearest"] / 2
    for package in REQUIREMENTS:
        [line] = [line for line in lines if f"{package} is missing" in line]
        assert f"pip install --no-deps --target {tmp_path}" in line


def test_report_full_precision(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "DEFAULT")
    for name, value in {"ISAS": ("DEFAULT",), "STEPS": 2, "TIMED": 1, "TURNS": 1}.items():
        monkeypatch.setattr(full_precision, name, value)
    _, _, *lines = full_precision.report(1, run=run_here)
    psnr = [float(line.strip("| ").split(" | ")[3]) for line in lines]
    assert psnr[0] == float("inf")
    # What the state of the sampler loses is more than what the transformer does.
    assert min(psnr[1:3]) > psnr[3] + 10


def test_images_after_gptq_are_nearer_than_after_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(full_precision, "STEPS", 2)
    ours = {name: {"fp4dit": SIDES[name]["fp4dit"]} for name in ("nearest", "GPTQ")}
    monkeypatch.setattr(calibration_images, "SIDES", ours)
    scale = Scale(prompts=(2, 1), sampler=2, steps=2)
    _, _, *lines = calibration_images.report(str(tmp_path), list(ours), scale, 2, run=run_here)
    nearest, gptq = (line.strip("| ").split(" | ") for line in lines)
    assert float(gptq[1]) < float(nearest[1]) / 2
    assert gptq[3] == "+0.00 ± 0.00"
