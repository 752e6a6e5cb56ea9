"""The benchmark of low-bit training, on a CPU and with tiny layers."""

from pathlib import Path

import pytest
import torch

from benchmarks import bench_training
from benchmarks.bench_training import PLAIN, RECIPES, Sizes, main

pytestmark = pytest.mark.unchecked


def test_report_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        bench_training, "RECIPES", {name: RECIPES[name] for name in ("Quartet", "MXFP8")}
    )
    out = tmp_path / "training.md"
    main(
        Sizes([(512, 1024)], tokens=1024, repeats=1, scenes=1),
        torch.device("cpu"),
        out,
        run=lambda part, *arguments: part(*arguments),
    )
    text = out.read_text()
    lines = [
        line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| 512 x 1024, ")
    ]
    rows = {
        name.strip().removeprefix("512 x 1024, "): [float(cell) for cell in cells]
        for name, *cells in lines
    }
    assert list(rows) == [PLAIN, *bench_training.RECIPES]
    x, weight = 2.0, 1.0  # MiB in bf16
    assert rows[PLAIN][4] == x
    assert rows["MXFP8"][4] == x + weight
    assert rows["Quartet"][4] == 1.5 * (x + weight)  # masks take half as much
    assert rows[PLAIN][1] == rows[PLAIN][3] == 1
    assert rows["Quartet"][1] > 1
    whole = [
        line.split("|")[1].strip()
        for line in text.partition("the shapes model, 1 scenes")[2].splitlines()[2:]
    ]
    assert whole == [PLAIN, *bench_training.RECIPES]
