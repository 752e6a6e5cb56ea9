"""Tables print, mark and average results, and draw their images."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fp4dit.tables.images import draw_difference, draw_image_grid, stack_pictures
from fp4dit.tables.published import PublishedResult
from fp4dit.tables.render import (
    render_csv,
    render_json,
    render_latex,
    render_markdown,
    render_terminal,
)
from fp4dit.tables.rows import ScoredRow, TableColumn, average_over_seeds, make_scored_row
from fp4dit.tables.significance import Mark
from fp4dit.tables.table import SMALL_SET_NOTE, Table
from fp4dit.utils.errors import UserError
from fp4dit.utils.statistics import compute_interval, compute_intervals

PSNR = TableColumn("psnr", "PSNR, dB", 1, per_image=True, better="higher")
SIZE = TableColumn("checkpoint_bytes", "Size, MB", 1, factor=1e-6)
ERROR = TableColumn("block_error", "Error", 4, better="lower")
METRICS = {
    "n": 64,
    "metrics": {"psnr": {"mean": 36.04, "low": 35.44, "high": 36.6}, "clip": None},
    "scalars": {"checkpoint_bytes": 5_250_000, "block_error": None},
}
FP4 = make_scored_row("FP4 & co", METRICS)
FULL = make_scored_row("Full", {**METRICS, "metrics": {"psnr": None}})
MISSING = ScoredRow("Later", {})
IMAGES = [{"prompt": f"prompt {i}", "seed": 42 + i} for i in range(8)]


def make_row(
    label: str, group: str | None, psnr: Sequence[float], error: float, images: Sequence = IMAGES
) -> ScoredRow:
    """Make a row from the PSNR of each image and the block error."""
    mean = sum(psnr) / len(psnr)
    metrics = {"psnr": {"mean": mean, "low": mean - 1, "high": mean + 1}}
    per_image = {"psnr": list(psnr)}
    return make_scored_row(
        label,
        {"n": 8, "metrics": metrics, "scalars": {"block_error": error}, "per_image": per_image},
        images,
        group=group,
    )


HARD = [20.0, 24.0, 28.0, 32.0, 36.0, 40.0, 44.0, 48.0]
TOP = make_row("Top", "W4A8", HARD, 0.02)
NEAR = [h + (0.9 if i % 2 else -1.1) for i, h in enumerate(HARD)]
CLOSE = make_row("Close", "W4A8", NEAR, 0.01)
WORSE = make_row("Worse", "W4A8", [h - 0.3 for h in HARD], 0.03)
OTHER = make_row("Other", "W4A4", [h - 9 for h in HARD], 0.09)
REFERENCE = make_row("Reference", None, [h + 9 for h in HARD], 0.0)
FULL_PRECISION = replace(REFERENCE, reference=True)
BEST, EQUAL, PLAIN = Mark(best=True), Mark(indistinguishable=True), Mark()


def format_legend(count: int, *marks: str) -> str:
    """Return the legend of a table with a number of comparisons and further marks."""
    test = (
        "Tested image by image of the same prompt and seed, by changing signs of the differences "
        "(9,999 times, or in all ways there are; Student's t from 1,000 images), at 5 % after "
        f"Holm's correction for the {count} comparisons of this table. Columns that are not means "
        "over images are not tested."
    )
    return " ".join(["Bold: the best of its group.", *marks, test])


LEGEND = format_legend(2, "†: not distinguishable from it.")


def test_markdown_shows_intervals_units_and_missing_values():
    assert render_markdown(Table([FP4, FULL, MISSING], [PSNR, SIZE])) == (
        "### Not complete: 2 of 3 rows\n\n"
        "|          |          PSNR, dB | Size, MB |\n"
        "| -------- | ----------------: | -------: |\n"
        "| FP4 & co | 36.0 [35.4, 36.6] |      5.2 |\n"
        "| Full     |                 – |      5.2 |\n"
        "| Later    |                 – |        – |\n"
    )


def test_csv_has_plain_numbers_and_empty_cells():
    assert render_csv(Table([FP4, FULL, MISSING], [PSNR, SIZE])) == (
        "label,psnr,psnr_low,psnr_high,checkpoint_bytes\n"
        "FP4 & co,36.04,35.44,36.6,5250000\nFull,,,,5250000\nLater,,,,\n"
    )


def test_latex_is_a_booktabs_tabular_with_escaped_text():
    assert render_latex(Table([FP4, MISSING], [PSNR, SIZE])) == (
        "% Not complete: 1 of 2 rows\n"
        "\\begin{tabular}{lrr}\n\\toprule\n & PSNR, dB & Size, MB \\\\\n\\midrule\n"
        "FP4 \\& co & $36.0 \\pm 0.6$ & $5.2$ \\\\\nLater & -- & -- \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_markdown_marks_the_best_of_each_group():
    table = Table([TOP, OTHER, CLOSE, WORSE, REFERENCE], [PSNR, ERROR], notes=["64 prompts."])
    assert render_markdown(table) == (
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
    lines = render_latex(
        Table([TOP, OTHER, CLOSE, REFERENCE], [PSNR], finding="Up  by 50 %.")
    ).splitlines()
    assert lines[0] == "% Up by 50 %."
    assert lines[4:-3] == [
        "\\midrule",
        "Reference & $43.0 \\pm 1.0$ \\\\",
        "\\midrule",
        "\\multicolumn{2}{l}{\\textit{W4A8}} \\\\",
        "Top & $\\mathbf{34.0} \\pm 1.0$ \\\\",
        "Close & $33.9^{\\dagger} \\pm 1.0$ \\\\",
        "\\midrule",
        "\\multicolumn{2}{l}{\\textit{W4A4}} \\\\",
        "Other & $25.0 \\pm 1.0$ \\\\",
    ]
    assert lines[-1] == f"% {format_legend(1, '†: not distinguishable from it.')}"


def test_csv_names_the_group_only_where_there_are_groups():
    lines = render_csv(Table([TOP, OTHER, REFERENCE], [ERROR])).splitlines()
    assert lines == [
        "label,group,block_error",
        "Reference,,0.0",
        "Top,W4A8,0.02",
        "Other,W4A4,0.09",
    ]


@pytest.mark.parametrize(
    "rival",
    [
        make_row("Other seeds", "W4A8", NEAR, 0.01, [{**image, "seed": 7} for image in IMAGES]),
        make_row("Images unknown", "W4A8", NEAR, 0.01, ()),
        ScoredRow("No values", CLOSE.values, "W4A8", {}, IMAGES),
        ScoredRow("One is infinite", CLOSE.values, "W4A8", {"psnr": [None, *NEAR[1:]]}, IMAGES),
    ],
    ids=lambda r: r.label,
)
def test_only_values_of_the_same_images_are_compared(rival: ScoredRow):
    assert [marks["psnr"] for marks in Table([TOP, rival], [PSNR]).marks] == [BEST, PLAIN]


def test_equal_rows_are_both_the_best():
    """A row without a value is neither the best nor equal to it."""
    unknown = ScoredRow("Unknown", {"n": 8}, "W4A8")
    table = Table([WORSE, TOP, TOP, unknown], [PSNR, ERROR])
    for column in ("psnr", "block_error"):
        assert [marks[column] for marks in table.marks] == [PLAIN, BEST, BEST, PLAIN]


def test_incomplete_groups_are_not_compared():
    table = Table([TOP, CLOSE, ScoredRow("Later", {}, "W4A8")], [PSNR, ERROR])
    assert all(set(marks.values()) == {PLAIN} for marks in table.marks)
    assert "†" not in render_markdown(table)


def test_findings_are_printed_only_for_complete_tables():
    texts = {
        "question": "Which is best?",
        "finding": "Top is.",
        "contradicts": ["They say Close is."],
        "notes": ["N."],
    }
    whole = render_markdown(Table([TOP, CLOSE], [PSNR], **texts))
    assert whole.startswith("### Top is.\n\n|")
    assert "\nNot as in the papers:\n\n- They say Close is.\n\nBold:" in whole
    for render in (render_markdown, render_latex):
        part = render(Table([TOP, CLOSE, MISSING], [PSNR], **texts))
        assert "Not complete: 2 of 3 rows\n" in part.splitlines(keepends=True)[0]
        assert "Top is." not in part
        assert "They say" not in part
        assert "N." in part
    assert render_markdown(Table([TOP], [PSNR], **{**texts, "finding": ""})).startswith(
        "### Which is best?\n"
    )


def test_a_column_is_better_higher_or_lower():
    with pytest.raises(UserError, match="column psnr: better is higher or lower, not 'more'"):
        TableColumn("psnr", "PSNR", better="more")


def test_rows_are_compared_with_full_precision_image_by_image():
    """A row that is lower by 0.3 for all 8 images is significantly worse; a mixed one is not."""
    mixed = replace(CLOSE, per_image={"psnr": NEAR[::-1]})
    text = render_markdown(Table([FULL_PRECISION, WORSE, mixed], [PSNR]))
    assert "33.7†↓ [32.7, 34.7]" in text
    assert "**33.9** [32.9, 34.9]" in text
    marks = ("†: not distinguishable from it.", "↓, ↑: worse, better than full precision.")
    assert format_legend(3, *marks) in text
    comparisons = {}
    for comparison in Table([TOP, CLOSE, WORSE, FULL_PRECISION], [PSNR]).comparisons:
        if comparison.rival != "best":
            comparisons[comparison.row] = comparison
            assert comparison.differs
            assert not comparison.gains
    assert list(comparisons) == [0, 1, 2]
    differences = np.array(WORSE.per_image["psnr"]) - np.array(FULL_PRECISION.per_image["psnr"])
    interval = compute_intervals(differences[None])[0]
    assert vars(comparisons[2].difference) == pytest.approx(vars(interval))
    header, *rows = csv.reader(io.StringIO(render_csv(Table([FULL_PRECISION, WORSE], [PSNR]))))
    differences = ["psnr_diff", "psnr_diff_low", "psnr_diff_high"]
    assert header == ["label", "group", "psnr", "psnr_low", "psnr_high", *differences]
    assert rows[0][-3:] == ["", "", ""]
    assert list(map(float, rows[1][-3:])) == pytest.approx(
        [interval.mean, interval.low, interval.high]
    )


def test_more_comparisons_make_marks_harder_to_get():
    """Compare by 8 images that all agree: p = 2/256 is enough for 6 comparisons, not for 12."""
    worse = [replace(WORSE, label=str(i)) for i in range(12)]
    for count, mark in ((6, PLAIN), (12, EQUAL)):
        table = Table([TOP, *worse[:count]], [PSNR])
        assert [marks["psnr"] for marks in table.marks] == [BEST] + count * [mark]


def test_seeds_are_averaged_image_by_image():
    other_images = [{**image, "seed": 1042 + i} for i, image in enumerate(IMAGES)]
    higher = [value + 1 for value in HARD]
    seeds = {
        0: make_row("Two", "W4A8", HARD, 0.01),
        1: make_row("Two", "W4A8", higher, 0.02, other_images),
    }
    both = average_over_seeds(seeds)
    mean = compute_interval([value + 0.5 for value in HARD])
    expected = {
        "psnr": mean.mean,
        "psnr_low": mean.low,
        "psnr_high": mean.high,
        "psnr_sd": 1 / 2**0.5,
        "psnr_seed0": 34,
        "psnr_seed1": 35,
        "block_error": 0.015,
        "seeds": 2,
        "n": 8,
    }
    assert both.values == pytest.approx(expected)
    assert "34.5 ± 0.7 [" in render_markdown(Table([both], [PSNR]))
    assert render_csv(Table([both], [PSNR])).startswith(
        "label,group,psnr,psnr_low,psnr_high,psnr_sd,psnr_seed0,psnr_seed1\n"
    )
    assert average_over_seeds({0: TOP}) == TOP
    assert not average_over_seeds({0: seeds[0], 1: ScoredRow("Two", {}, "W4A8")}).values
    images = [{**image, "prompt": "another"} for image in other_images]
    with pytest.raises(ValueError, match="Two: its seeds drew other prompts"):
        average_over_seeds({0: seeds[0], 1: replace(seeds[1], images=images)})


FID = TableColumn("fid", "FID", 1, per_set=True, better="lower")


def make_set_row(label: str, n: int, **scores: float) -> ScoredRow:
    means = {name: {"mean": v, "low": v - 1, "high": v + 1} for name, v in scores.items()}
    return make_scored_row(label, {"n": n, "metrics": means, "scalars": {}}, group="W4A4")


def split_cells(line: str) -> list[str]:
    """Return the cells of a line of a Markdown table."""
    return list(map(str.strip, line.split("|")[1:-1]))


def test_set_metrics_have_a_column_per_reference():
    rows = [
        make_set_row("A", 64, **{"fid/full-64/tf": 9.0, "fid/coco-64/tf": 30.0}),
        make_set_row("B", 5000, **{"fid/full-64/tf": 8.0}),
    ]
    lines = render_markdown(Table(rows, [FID])).splitlines()
    assert split_cells(lines[0]) == ["", "FID, full-64, tf", "FID, coco-64, tf"]
    assert split_cells(lines[3]) == ["A", "9.0⚠ [8.0, 10.0]", "30.0⚠ [29.0, 31.0]"]
    assert split_cells(lines[4]) == ["B", "**8.0** [7.0, 9.0]", "–"]
    assert SMALL_SET_NOTE in lines
    assert "FID |" in render_markdown(Table([FP4], [FID]))


def test_a_group_of_prompts_can_be_a_column():
    """Print the notes and definition of its metric only once."""
    metrics = METRICS | {
        "groups": {"hps": {"anime": {"mean": 0.25, "low": 0.2, "high": 0.3}}},
        "notes": {"hps": "3 of 64 prompts were cut"},
        "about": {"hps": "HPS " + "of a very long name " * 20},
    }
    table = Table(
        [make_scored_row("A", metrics), make_scored_row("B", metrics)],
        [TableColumn("hps", "HPS"), TableColumn("hps:anime", "HPS, anime", 2, per_image=True)],
    )
    text = render_markdown(table)
    assert "0.25 [0.20, 0.30]" in text
    assert text.count("HPS: 3 of 64 prompts were cut.\n") == 1
    assert text.count("HPS: HPS of a very") == 1
    assert all(len(line) < 200 for line in text.splitlines())
    assert json.loads(render_json(table))["about_columns"] == {"hps": [metrics["about"]["hps"]]}


def test_published_numbers_stand_beside_ours():
    """Print the published number, our difference to it, and its source."""
    known = PublishedResult({"psnr": 34.2}, "A paper, 5,000 images")
    unknown = PublishedResult({"block_error": 0.02}, "Another paper")
    rows = [
        replace(TOP, published=known),
        replace(CLOSE, published=unknown),
        WORSE,
        ScoredRow("Later", {}, "W4A8", published=known),
    ]
    lines = render_markdown(Table(rows, [PSNR, ERROR])).splitlines()
    grid = [split_cells(line) for line in lines if line.startswith("|")]
    assert grid[0] == ["", "PSNR, dB", "published", "Error", "published"]
    published = [cells[2] for cells in grid[3:]]
    assert published == ["34.2 (-0.2) [1]", "", "", "34.2 [1]"]
    assert "[1] Published: A paper, 5,000 images." in lines
    assert "[2] Published: Another paper." in lines
    first = next(csv.DictReader(io.StringIO(render_csv(Table(rows, [PSNR])))))
    assert (float(first["psnr_published"]), float(first["psnr_minus_published"])) == pytest.approx(
        (34.2, -0.2)
    )


def test_differences_from_authors_code_are_footnotes():
    """Print equal lists of differences once, with the labels of their rows."""
    shared = ("Its rank is 128.", "Its ranges are not learned.")
    rows = [replace(TOP, differs=shared), replace(CLOSE, differs=shared), WORSE]
    rows.append(replace(REFERENCE, differs=("It has no branch.",)))
    notes = [
        line for line in render_markdown(Table(rows, [PSNR])).splitlines() if "authors'" in line
    ]
    assert notes == [
        f"{TOP.label}, {CLOSE.label}, beside the authors' code: {' '.join(shared)}",
        f"{REFERENCE.label}, beside the authors' code: It has no branch.",
    ]


def test_a_terminal_gets_aligned_columns_and_no_markdown():
    table = Table([TOP, CLOSE, REFERENCE], [PSNR, ERROR], finding="Top is.")
    text = render_terminal(table)
    assert text.splitlines()[:7] == [
        "Top is.",
        "",
        "                     PSNR, dB    Error",
        "Reference   43.0 [42.0, 44.0]   0.0000",
        "W4A8",
        "  Top      34.0• [33.0, 35.0]   0.0200",
        "  Close    33.9† [32.9, 34.9]  0.0100•",
    ]
    bold = render_terminal(table, bold=True)
    assert "  Top       \x1b[1m34.0\x1b[0m [33.0, 35.0]  0.0200\n" in bold
    assert "*" not in text + bold
    assert max(map(len, text.splitlines())) <= 120


def test_json_contains_everything():
    first = make_row("One", "W4A8", [3.0], 0.1, IMAGES[:1])
    second = make_row("Two", "W4A8", [2.0], 0.1, IMAGES[:1])
    for rows in ([FULL_PRECISION, TOP, CLOSE, MISSING], [first, second]):
        table = Table(rows, [PSNR, ERROR])
        content = json.loads(render_json(table))
        count = 0
        for row, row_json in zip(rows, content["rows"], strict=True):
            assert row_json["label"] == row.label
            count += len(row_json["differences"])
        assert count == len(table.comparisons)
        assert content["footnotes"] == table.format_footnotes("best")
    interval = {"mean": -1.0, "low": None, "high": None}
    difference = {"column": "psnr", "with": "best", **interval, "p": 1.0}
    assert content["rows"][1]["differences"][0] == difference


@pytest.fixture
def image_folders(tmp_path: Path) -> dict[str, Path]:
    for name, colour in {"red": (255, 0, 0), "blue": (0, 0, 255)}.items():
        (tmp_path / name / "images").mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), colour).save(tmp_path / name / "images" / f"{i:05}.png")
        entries = [{"prompt": f"prompt {i}", "seed": i} for i in range(3)]
        (tmp_path / name / "images.json").write_text(json.dumps(entries))
    return {"Red method": tmp_path / "red", "Blue method with a long name": tmp_path / "blue"}


def test_the_picture_has_prompts_down_and_methods_across(image_folders: dict[str, Path]):
    picture = draw_image_grid(image_folders, images=[0, 1, 7], tile=32, gap=4)
    top = picture.height - 2 * 36
    assert picture.width == 32 + 4 + 2 * 36
    assert picture.crop((0, 0, picture.width, 4)).getcolors() == [
        (4 * picture.width, (255, 255, 255))
    ]  # no title is cut
    for line in range(2):
        y = top + 36 * line + 16
        assert picture.getpixel((32 + 4 + 16, y)) == (255, 0, 0)
        assert picture.getpixel((32 + 4 + 36 + 16, y)) == (0, 0, 255)


def test_the_picture_leaves_a_missing_image_blank(image_folders: dict[str, Path]):
    (image_folders["Red method"] / "images" / "00000.png").unlink()
    picture = draw_image_grid(image_folders, images=[0], tile=32, gap=4)
    assert picture.getpixel((32 + 4 + 16, picture.height - 20)) == (255, 255, 255)


def test_the_picture_magnifies_differences_to_the_first_column(image_folders: dict[str, Path]):
    Image.new("RGB", (16, 16), (250, 0, 3)).save(
        image_folders["Blue method with a long name"] / "images" / "00002.png"
    )
    picture = draw_image_grid(image_folders, images=[2], tile=32, gap=4, gain=8)
    y = picture.height - 20
    assert picture.getpixel((32 + 4 + 16, y)) == (255, 255, 255)
    assert picture.getpixel((32 + 4 + 36 + 16, y)) == (40, 0, 24)
    assert picture.getpixel((32 + 4 + 36 + 16, y - 36)) == (250, 0, 3)


def test_pictures_are_stacked_on_paper():
    red, blue = Image.new("RGB", (10, 5), (255, 0, 0)), Image.new("RGB", (20, 5), (0, 0, 255))
    both = stack_pictures([red, blue], gap=2)
    assert both.size == (20, 12)
    assert [both.getpixel(at) for at in ((0, 0), (15, 0), (0, 6), (15, 11))] == [
        *((255, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 255))
    ]


def test_a_difference_is_absolute_and_brighter(tmp_path: Path):
    for name, colour in (("a", (10, 200, 7)), ("b", (13, 100, 7))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name, "PNG")
    assert draw_difference(tmp_path / "a", tmp_path / "b").getpixel((0, 0)) == (12, 255, 0)
