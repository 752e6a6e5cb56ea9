import csv
import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from fp4dit import pictures
from fp4dit.comparisons import Mark
from fp4dit.errors import UserError
from fp4dit.exports import as_csv, as_json
from fp4dit.forms import latex, markdown, terminal
from fp4dit.pictures import grid, stacked
from fp4dit.published import Published
from fp4dit.rows import Column, Row, over_seeds, row
from fp4dit.statistics import difference, interval
from fp4dit.tables import FEW_NOTE, Table
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
        images,
        group=group,
    )


HARD = [20.0, 24.0, 28.0, 32.0, 36.0, 40.0, 44.0, 48.0]
TOP = scored("Top", "W4A8", HARD, 0.02)
NEAR = [h + (0.9 if i % 2 else -1.1) for i, h in enumerate(HARD)]
CLOSE = scored("Close", "W4A8", NEAR, 0.01)
WORSE = scored("Worse", "W4A8", [h - 0.3 for h in HARD], 0.03)
OTHER = scored("Other", "W4A4", [h - 9 for h in HARD], 0.09)
REFERENCE = scored("Reference", None, [h + 9 for h in HARD], 0.0)
FULL_PRECISION = replace(REFERENCE, reference=True)
BEST, EQUAL, PLAIN = Mark(best=True), Mark(equal=True), Mark()


def legend(count: int, *marks: str) -> str:
    test = (
        "Tested image by image of the same prompt and seed, by changing signs of the differences (9,999 times, or in "
        "all ways there are; Student's t from 1,000 images), at 5 % after Holm's correction for the "
        f"{count} comparisons of this table. What is no mean over images is not tested."
    )
    return " ".join(["Bold: the best of its group.", *marks, test])


LEGEND = legend(2, "†: not distinguishable from it.")


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
        "Close & $33.9^{\\dagger} \\pm 1.0$ \\\\",
        "\\midrule",
        "\\multicolumn{2}{l}{\\textit{W4A4}} \\\\",
        "Other & $25.0 \\pm 1.0$ \\\\",
    ]
    assert lines[-1] == f"% {legend(1, '†: not distinguishable from it.')}"


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
    assert [marks["psnr"] for marks in Table([TOP, rival], [PSNR]).marks] == [BEST, PLAIN]


def test_equal_rows_are_both_the_best_and_a_value_that_is_missing_is_neither():
    unknown = Row("Unknown", {"n": 8}, "W4A8")
    marks = Table([WORSE, TOP, TOP, unknown], [PSNR, ERROR]).marks
    assert [m["psnr"] for m in marks] == [PLAIN, BEST, BEST, PLAIN]
    assert [m["block_error"] for m in marks] == [PLAIN, BEST, BEST, PLAIN]


def test_a_group_that_lacks_a_row_is_not_judged():
    table = Table([TOP, CLOSE, Row("Later", {}, "W4A8")], [PSNR, ERROR])
    assert all(mark == PLAIN for marks in table.marks for mark in marks.values())
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
    given = OmegaConf.load(CONF / "tables.yaml").columns
    columns = [Column(name, **fields) for name, fields in given.items()]
    header = next(csv.reader(io.StringIO(as_csv(Table([], columns)))))
    means = [f"{m}{end}" for m in ("psnr", "ssim", "oracle", "clip") for end in ("", "_low", "_high")]
    scalars = ["block_error", "bits_weight", "bits_activation", "checkpoint_bytes", "calibration_seconds", "n"]
    assert header == ["label", *means, *scalars]
    assert {c.name for c in columns if c.better == "lower"} == {"block_error"}


def test_a_row_is_held_against_full_precision_image_by_image():
    """Less by 0.3 for every image: certain of 8, whatever the images are like; NEAR is not."""
    mixed = replace(CLOSE, per_image={"psnr": NEAR[::-1]})
    text = markdown(Table([FULL_PRECISION, WORSE, mixed], [PSNR]))
    assert "33.7†↓ [32.7, 34.7]" in text
    assert "**33.9** [32.9, 34.9]" in text
    assert legend(3, "†: not distinguishable from it.", "↓, ↑: worse, better than full precision.") in text
    found = {c.row: c for c in Table([TOP, CLOSE, WORSE, FULL_PRECISION], [PSNR]).comparisons if c.rival != "best"}
    assert [(c.differs, c.gains) for c in found.values()] == [(True, False)] * 3
    against = difference(WORSE.per_image["psnr"], FULL_PRECISION.per_image["psnr"])  # pyright: ignore
    assert vars(found[2].difference) == pytest.approx(vars(against))
    header, *rows = csv.reader(io.StringIO(as_csv(Table([FULL_PRECISION, WORSE], [PSNR]))))
    assert header == [
        "label",
        "group",
        *(f"psnr{x}" for x in ("", "_low", "_high", "_diff", "_diff_low", "_diff_high")),
    ]
    assert rows[0][-3:] == ["", "", ""]
    assert [float(x) for x in rows[1][-3:]] == pytest.approx([against.mean, against.low, against.high])


def test_each_comparison_more_makes_a_mark_harder_to_get():
    """Of 8 images that all say the same p is 2/256: enough for 6 comparisons, 12 are too many."""
    worse = [replace(WORSE, label=str(i)) for i in range(12)]
    marks = lambda rivals: [m["psnr"] for m in Table([TOP, *rivals], [PSNR]).marks]
    assert marks(worse[:6]) == [BEST] + 6 * [PLAIN]
    assert marks(worse) == [BEST] + 12 * [EQUAL]


def test_seeds_are_averaged_image_by_image_and_their_spread_shown():
    drawn = [[{"prompt": f"prompt {i}", "seed": seed + i} for i in range(8)] for seed in (0, 1000)]
    seeds = {s: scored("Two", "W4A8", [h + s for h in HARD], 0.01 * (1 + s), drawn[s]) for s in (0, 1)}
    both = over_seeds(seeds)
    mean = interval([h + 0.5 for h in HARD])
    assert [both.values[f"psnr{x}"] for x in ("", "_low", "_high")] == pytest.approx([mean.mean, mean.low, mean.high])
    assert both.values["psnr_sd"] == pytest.approx(1 / 2**0.5)
    assert (both.values["psnr_seed0"], both.values["psnr_seed1"], both.values["seeds"]) == (34, 35, 2)
    assert (both.values["block_error"], both.values["n"]) == (pytest.approx(0.015), 8)
    assert "34.5 ± 0.7 [" in markdown(Table([both], [PSNR]))
    assert as_csv(Table([both], [PSNR])).startswith(
        "label,group,psnr,psnr_low,psnr_high,psnr_sd,psnr_seed0,psnr_seed1\n"
    )
    assert over_seeds({0: TOP}) == TOP
    assert not over_seeds({0: seeds[0], 1: Row("Two", {}, "W4A8")}).values
    with pytest.raises(ValueError, match="Two: its seeds drew other prompts"):
        over_seeds({0: seeds[0], 1: replace(seeds[1], images=[{**i, "prompt": "another"} for i in drawn[1]])})


FID = Column("fid", "FID", 1, of_set=True, better="lower")


def of_set(label: str, n: int, **scores: float) -> Row:
    means = {name: {"mean": v, "low": v - 1, "high": v + 1} for name, v in scores.items()}
    return row(label, {"n": n, "metrics": means, "scalars": {}}, group="W4A4")


def test_scores_of_a_set_that_are_against_others_stand_in_columns_of_their_own():
    rows = [
        of_set("A", 64, **{"fid/full-64/tf": 9.0, "fid/coco-64/tf": 30.0}),
        of_set("B", 5000, **{"fid/full-64/tf": 8.0}),
    ]
    lines = markdown(Table(rows, [FID])).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[2:-1]] == ["FID, full-64, tf", "FID, coco-64, tf"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["A", "9.0⚠ [8.0, 10.0]", "30.0⚠ [29.0, 31.0]"]
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["B", "**8.0** [7.0, 9.0]", "–"]
    assert FEW_NOTE in lines
    assert "FID |" in markdown(Table([FP4], [FID]))


def test_a_style_of_prompts_can_be_a_column_and_a_metric_says_what_it_is():
    metrics = METRICS | {
        "groups": {"hps": {"anime": {"mean": 0.25, "low": 0.2, "high": 0.3}}},
        "notes": {"hps": "3 of 64 prompts were cut"},
        "about": {"hps": "HPS " + "of a very long name " * 20},
    }
    table = Table(
        [row("A", metrics), row("B", metrics)],
        [Column("hps", "HPS"), Column("hps:anime", "HPS, anime", 2, interval=True)],
    )
    text = markdown(table)
    assert "0.25 [0.20, 0.30]" in text
    assert text.count("HPS: 3 of 64 prompts were cut.\n") == 1
    assert text.count("HPS: HPS of a very") == 1
    assert all(len(line) < 200 for line in text.splitlines())
    assert json.loads(as_json(table))["about_columns"] == {"hps": [metrics["about"]["hps"]]}


def test_what_is_published_stands_beside_with_the_difference_and_its_source():
    known = Published({"psnr": 34.2}, "A paper, 5,000 images")
    unknown = Published({"psnr": None}, "Another paper", "not available here")
    rows = [
        replace(TOP, published=known),
        replace(CLOSE, published=unknown),
        WORSE,
        Row("Later", {}, "W4A8", published=known),
    ]
    lines = markdown(Table(rows, [PSNR, ERROR])).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert cells[0] == ["", "PSNR, dB", "published", "Error"]
    assert [c[2] for c in cells[3:]] == ["34.2 (-0.2) [1]", "n/a [2]", "", "34.2 [1]"]
    assert "[1] Published: A paper, 5,000 images." in lines
    assert "[2] Published: Another paper. n/a: not available here." in lines
    first = next(csv.DictReader(io.StringIO(as_csv(Table(rows, [PSNR])))))
    assert (float(first["psnr_published"]), float(first["psnr_minus_published"])) == pytest.approx((34.2, -0.2))


def test_a_terminal_gets_aligned_columns_and_no_markdown():
    table = Table([TOP, CLOSE, REFERENCE], [PSNR, ERROR], finding="Top is.")
    text = terminal(table)
    assert text.splitlines()[:7] == [
        "Top is.",
        "",
        "                     PSNR, dB    Error",
        "Reference   43.0 [42.0, 44.0]   0.0000",
        "W4A8",
        "  Top      34.0• [33.0, 35.0]   0.0200",
        "  Close    33.9† [32.9, 34.9]  0.0100•",
    ]
    bold = terminal(table, bold=True)
    assert "  Top       \x1b[1m34.0\x1b[0m [33.0, 35.0]  0.0200\n" in bold
    assert "*" not in text + bold
    assert max(map(len, text.splitlines())) <= 120


def test_json_holds_all_that_was_computed():
    single = [scored(name, "W4A8", [value], 0.1, IMAGES[:1]) for name, value in (("One", 3.0), ("Two", 2.0))]
    for rows in ([FULL_PRECISION, TOP, CLOSE, MISSING], single):
        table = Table(rows, [PSNR, ERROR])
        whole = json.loads(as_json(table))
        assert [r["label"] for r in whole["rows"]] == [r.label for r in rows]
        assert sum(len(r["differences"]) for r in whole["rows"]) == len(table.comparisons)
        assert whole["footnotes"] == table.footnotes("best")
    assert whole["rows"][1]["differences"][0] == {
        **{"column": "psnr", "with": "best", "mean": -1.0, "low": None, "high": None, "p": 1.0}
    }


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
    top = picture.height - 2 * 36
    assert picture.width == 32 + 4 + 2 * 36
    assert picture.crop((0, 0, picture.width, 4)).getcolors() == [
        (4 * picture.width, (255, 255, 255))
    ]  # no title is cut
    for line in range(2):
        y = top + 36 * line + 16
        assert picture.getpixel((32 + 4 + 16, y)) == (255, 0, 0)
        assert picture.getpixel((32 + 4 + 36 + 16, y)) == (0, 0, 255)


def test_the_picture_leaves_a_missing_image_blank(folders: dict[str, Path]):
    (folders["Red method"] / "images" / "00000.png").unlink()
    picture = grid(folders, prompts=1, tile=32, gap=4)
    assert picture.getpixel((32 + 4 + 16, picture.height - 20)) == (255, 255, 255)


def test_pictures_are_stacked_on_paper():
    red, blue = Image.new("RGB", (10, 5), (255, 0, 0)), Image.new("RGB", (20, 5), (0, 0, 255))
    both = stacked([red, blue], gap=2)
    assert both.size == (20, 12)
    assert [both.getpixel(at) for at in ((0, 0), (15, 0), (0, 6), (15, 11))] == [
        *((255, 0, 0), (255, 255, 255), (255, 255, 255), (0, 0, 255))
    ]


def test_a_difference_is_absolute_and_brighter(tmp_path: Path):
    for name, colour in (("a", (10, 200, 7)), ("b", (13, 100, 7))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / name, "PNG")
    assert pictures.difference(tmp_path / "a", tmp_path / "b").getpixel((0, 0)) == (12, 255, 0)
