import csv
import io
import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from fp4dit.grid import grid
from fp4dit.tables import Column, Row, as_csv, latex, markdown, row
from pipelines.resolvers import CONF

PSNR = Column("psnr", "PSNR, dB", 1, interval=True)
SIZE = Column("checkpoint_bytes", "Size, MB", 1, factor=1e-6)
METRICS = {
    "n": 64,
    "metrics": {"psnr": {"mean": 36.04, "low": 35.44, "high": 36.6}, "clip": None},
    "scalars": {"checkpoint_bytes": 5_250_000, "block_error": None},
}
FP4, FULL, MISSING = row("FP4 & co", METRICS), row("Full", {**METRICS, "metrics": {"psnr": None}}), Row("Later", {})


def test_markdown_shows_intervals_units_and_what_is_missing():
    assert markdown([FP4, FULL, MISSING], [PSNR, SIZE]) == (
        "|          |          PSNR, dB | Size, MB |\n"
        "| -------- | ----------------: | -------: |\n"
        "| FP4 & co | 36.0 [35.4, 36.6] |      5.2 |\n"
        "| Full     |                 – |      5.2 |\n"
        "| Later    |                 – |        – |\n"
    )


def test_csv_holds_plain_numbers_and_empty_cells():
    assert as_csv([FP4, FULL, MISSING], [PSNR, SIZE]) == (
        "label,psnr,psnr_low,psnr_high,checkpoint_bytes\n"
        "FP4 & co,36.04,35.44,36.6,5250000\nFull,,,,5250000\nLater,,,,\n"
    )


def test_latex_is_a_booktabs_tabular_with_escaped_text():
    assert latex([FP4, MISSING], [PSNR, SIZE]) == (
        "\\begin{tabular}{lrr}\n\\toprule\n & PSNR, dB & Size, MB \\\\\n\\midrule\n"
        "FP4 \\& co & $36.0 \\pm 0.6$ & $5.2$ \\\\\nLater & -- & -- \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_the_columns_of_our_tables_are_those_of_the_issue():
    columns = [instantiate(column) for column in OmegaConf.load(CONF / "table.yaml").columns]
    header = next(csv.reader(io.StringIO(as_csv([], columns))))
    means = [f"{m}{end}" for m in ("psnr", "ssim", "oracle", "clip") for end in ("", "_low", "_high")]
    scalars = ["block_error", "bits_weight", "bits_activation", "checkpoint_bytes", "calibration_seconds", "n"]
    assert header == ["label", *means, *scalars]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        (tmp_path / name / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / "images" / f"{i:05}.png")
        entries = [{"prompt": f"prompt {i}", "seed": i} for i in range(3)]
        (tmp_path / name / "images.json").write_text(json.dumps(entries))
    return {"Red method": tmp_path / "red", "Blue method with a long name": tmp_path / "blue"}


def test_the_picture_has_prompts_down_and_methods_across(folders: dict[str, Path]):
    picture = grid(folders, prompts=2, tile=32, gap=4)
    assert picture.size == (32 + 4 + 2 * 36, 46 + 4 + 2 * 36)
    for line in range(2):
        y = 46 + 4 + 36 * line + 16
        assert picture.getpixel((32 + 4 + 16, y)) == (255, 0, 0)
        assert picture.getpixel((32 + 4 + 36 + 16, y)) == (0, 0, 255)


def test_the_picture_leaves_a_missing_image_blank(folders: dict[str, Path]):
    (folders["Red method"] / "images" / "00000.png").unlink()
    assert grid(folders, prompts=1, tile=32, gap=4).getpixel((32 + 4 + 16, 46 + 4 + 16)) == (255, 255, 255)
