import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from fp4dit.errors import UserError
from fp4dit.pictures import grid, stacked
from fp4dit.tables import LEGEND, Column, Row, Table, as_csv, latex, markdown, row
from pipelines.resolvers import CONF

PSNR = Column("psnr", "PSNR, dB", 1, interval=True, better="higher")
SIZE = Column("checkpoint_bytes", "Size, MB", 1, factor=1e-6)
ERROR = Column("block_error", "Error", 4, better="lower")
METRICS = {
    "n": 64,
    "metrics": {"psnr": {"mean": 36.04, "low": 35.44, "high": 36.6}, "clip": None},
    "scalars": {"checkpoint_bytes": 5_250_000, "block_error": None},
}
FP4, FULL, MISSING = row("FP4 & co", METRICS), row("Full", {**METRICS, "metrics": {"psnr": None}}), Row("Later", {})
IMAGES = [{"prompt": f"prompt {i}", "seed": 42 + i} for i in range(8)]


def scored(label: str, group: str | None, psnr: Sequence[float], error: float, images: Sequence = IMAGES) -> Row:
    mean = sum(psnr) / len(psnr)
    metrics = {"psnr": {"mean": mean, "low": mean - 1, "high": mean + 1}}
    per_image = {"psnr": list(psnr)}
    return row(
        label,
        {"n": 8, "metrics": metrics, "scalars": {"block_error": error}, "per_image": per_image},
        group,
        images,
    )


HARD = [20.0, 24.0, 28.0, 32.0, 36.0, 40.0, 44.0, 48.0]
TOP = scored("Top", "W4A8", HARD, 0.02)
NEAR = [h + (0.9 if i % 2 else -1.1) for i, h in enumerate(HARD)]
CLOSE = scored("Close", "W4A8", NEAR, 0.01)
WORSE = scored("Worse", "W4A8", [h - 0.3 for h in HARD], 0.03)
OTHER = scored("Other", "W4A4", [h - 9 for h in HARD], 0.09)
REFERENCE = scored("Reference", None, [h + 9 for h in HARD], 0.0)


def test_markdown_shows_intervals_units_and_what_is_missing():
    assert markdown(Table([FP4, FULL, MISSING], [PSNR, SIZE])) == (
        "### Not complete: 2 of 3 rows\n\n"
        "|          |          PSNR, dB | Size, MB |\n"
        "| -------- | ----------------: | -------: |\n"
        "| FP4 & co | 36.0 [35.4, 36.6] |      5.2 |\n"
        "| Full     |                 – |      5.2 |\n"
        "| Later    |                 – |        – |\n"
    )


def test_csv_holds_plain_numbers_and_empty_cells():
    assert as_csv(Table([FP4, FULL, MISSING], [PSNR, SIZE])) == (
        "label,psnr,psnr_low,psnr_high,checkpoint_bytes\n"
        "FP4 & co,36.04,35.44,36.6,5250000\nFull,,,,5250000\nLater,,,,\n"
    )


def test_latex_is_a_booktabs_tabular_with_escaped_text():
    assert latex(Table([FP4, MISSING], [PSNR, SIZE])) == (
        "% Not complete: 1 of 2 rows\n"
        "\\begin{tabular}{lrr}\n\\toprule\n & PSNR, dB & Size, MB \\\\\n\\midrule\n"
        "FP4 \\& co & $36.0 \\pm 0.6$ & $5.2$ \\\\\nLater & -- & -- \\\\\n\\bottomrule\n\\end{tabular}\n"
    )


def test_markdown_heads_groups_and_marks_the_best_and_what_is_as_good():
    table = Table([TOP, OTHER, CLOSE, WORSE, REFERENCE], [PSNR, ERROR], notes=["64 prompts."])
    assert markdown(table) == (
        "|           |              PSNR, dB |      Error |\n"
        "| --------- | --------------------: | ---------: |\n"
        "| Reference |     43.0 [42.0, 44.0] |     0.0000 |\n"
        "| **W4A8**  |                       |            |\n"
        "| Top       | **34.0** [33.0, 35.0] |     0.0200 |\n"
        "| Close     |    33.9† [32.9, 34.9] | **0.0100** |\n"
        "| Worse     |     33.7 [32.7, 34.7] |     0.0300 |\n"
        "| **W4A4**  |                       |            |\n"
        "| Other     |     25.0 [24.0, 26.0] |     0.0900 |\n"
        f"\n{LEGEND}\n\n64 prompts.\n"
    )


def test_latex_parts_groups_with_rules_and_marks_them():
    lines = latex(Table([TOP, OTHER, CLOSE, REFERENCE], [PSNR], finding="Up  by 50 %.")).splitlines()
    assert lines[0] == "% Up by 50 %."
    assert lines[4:-3] == [
        "\\midrule",
        "Reference & $43.0 \\pm 1.0$ \\\\",
        "\\midrule",
        "\\multicolumn{2}{l}{\\textit{W4A8}} \\\\",
        "Top & $\\mathbf{34.0} \\pm 1.0$ \\\\",
        "Close & $33.9^\\dagger \\pm 1.0$ \\\\",
        "\\midrule",
        "\\multicolumn{2}{l}{\\textit{W4A4}} \\\\",
        "Other & $25.0 \\pm 1.0$ \\\\",
    ]
    assert lines[-1] == f"% {LEGEND}"


def test_csv_names_the_group_only_where_there_are_groups():
    lines = as_csv(Table([TOP, OTHER, REFERENCE], [ERROR])).splitlines()
    assert lines == ["label,group,block_error", "Reference,,0.0", "Top,W4A8,0.02", "Other,W4A4,0.09"]


@pytest.mark.parametrize(
    "rival",
    [
        scored("Other seeds", "W4A8", NEAR, 0.01, [{**image, "seed": 7} for image in IMAGES]),
        scored("Images unknown", "W4A8", NEAR, 0.01, ()),
        Row("No values", CLOSE.values, "W4A8", {}, IMAGES),
        Row("One is infinite", CLOSE.values, "W4A8", {"psnr": [None, *NEAR[1:]]}, IMAGES),
    ],
    ids=lambda r: r.label,
)
def test_only_values_of_the_same_images_are_compared(rival: Row):
    assert [marks["psnr"] for marks in Table([TOP, rival], [PSNR]).marks] == ["best", ""]


def test_equal_rows_are_both_the_best_and_a_value_that_is_missing_is_neither():
    unknown = Row("Unknown", {"n": 8}, "W4A8")
    marks = Table([WORSE, TOP, TOP, unknown], [PSNR, ERROR]).marks
    assert [m["psnr"] for m in marks] == ["", "best", "best", ""]
    assert [m["block_error"] for m in marks] == ["", "best", "best", ""]


def test_a_group_that_lacks_a_row_is_not_judged():
    table = Table([TOP, CLOSE, Row("Later", {}, "W4A8")], [PSNR, ERROR])
    assert table.marks == [{}, {}, {}]
    assert "†" not in markdown(table)


def test_what_was_found_is_said_only_when_all_of_it_is_there():
    said = {"question": "Which is best?", "finding": "Top is.", "contradicts": ["They say Close is."], "notes": ["N."]}
    whole = markdown(Table([TOP, CLOSE], [PSNR], **said))
    assert whole.startswith("### Top is.\n\n|")
    assert "\nNot as in the papers:\n\n- They say Close is.\n\nBold:" in whole
    for form in (markdown, latex):
        part = form(Table([TOP, CLOSE, MISSING], [PSNR], **said))
        assert "Not complete: 2 of 3 rows\n" in part.splitlines(keepends=True)[0]
        assert "Top is." not in part
        assert "They say" not in part
        assert "N." in part
    assert markdown(Table([TOP], [PSNR], **{**said, "finding": ""})).startswith("### Which is best?\n")


def test_a_column_is_better_higher_or_lower():
    with pytest.raises(UserError, match="column psnr: better is higher or lower, not 'more'"):
        Column("psnr", "PSNR", better="more")


def test_the_columns_of_our_tables_are_those_of_the_issue():
    given = OmegaConf.load(CONF / "table.yaml").columns
    columns = [Column(name, **fields) for name, fields in given.items()]
    header = next(csv.reader(io.StringIO(as_csv(Table([], columns)))))
    means = [f"{m}{end}" for m in ("psnr", "ssim", "oracle", "clip") for end in ("", "_low", "_high")]
    scalars = ["block_error", "bits_weight", "bits_activation", "checkpoint_bytes", "calibration_seconds", "n"]
    assert header == ["label", *means, *scalars]
    assert {c.name for c in columns if c.better == "lower"} == {"block_error"}


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


def test_pictures_are_stacked_on_paper():
    red, blue = Image.new("RGB", (10, 5), (255, 0, 0)), Image.new("RGB", (20, 5), (0, 0, 255))
    both = stacked([red, blue], gap=2)
    assert both.size == (20, 12)
    assert [both.getpixel(at) for at in ((0, 0), (15, 0), (0, 6), (15, 11))] == [
        *((255, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 255))
    ]
