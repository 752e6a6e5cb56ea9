"""The report shows a table as an HTML page. tests/browser opens it in a browser."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from torchvision.transforms.functional import to_tensor

import pipelines.report
from fp4dit.report.images import ImageLimits, ReportImages
from fp4dit.report.page import embed_json, render_page
from fp4dit.report.plots import (
    find_pareto_front,
    find_sqnr_range,
    make_front_plots,
    make_learning_curves,
    make_sqnr_plot,
)
from fp4dit.report.row_data import RowData
from fp4dit.tables.rows import ScoredRow, TableColumn, make_scored_row
from fp4dit.tables.table import Table
from fp4dit.utils.errors import UserError
from fp4dit.utils.images import save_image
from tests.conftest import ROOT, Run

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \"'&🙂"


class Scripts(HTMLParser):
    """Parser that collects the text of each script element by id, as a browser does."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, str] = {}
        self.tags: list[str] = []
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.inside = dict(attrs).get("id", "") if tag == "script" else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside is not None:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


def read_page(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the data of the report, and everything that is embedded, by id."""
    scripts = Scripts(path.read_text()).texts
    parsed = {}
    for name, text in scripts.items():
        if name not in ("", "plotly"):
            parsed[name] = json.loads(text)
    return parsed["report"], parsed


@pytest.fixture
def toy_table(tmp_path: Path) -> list[str]:
    """Write a table with two rows of toy stages and one of a missing model.

    Return the overrides that select it.
    """
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture: {images: 2}\nquestion: Which?\nrows:\n"
        "  - {label: One, overrides: [stages=toy]}\n"
        "  - {label: Seven, group: Seeds, overrides: [stages=toy, generation.seed=7]}\n"
        "  - {label: Gone, overrides: [model=generic, model.path=/no/such/folder]}\n"
    )
    return ["table=toy", f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"]


def write_report(run: Run, *arguments: str) -> int:
    """Run the command, and return its exit status."""
    return run(*arguments, main=pipelines.report.main)


def test_a_page_shows_results_and_says_what_is_missing(
    run: Run, toy_table: list[str], tmp_path: Path, capfd
):
    assert run("stages=toy", toy_table[1]) == 0
    assert write_report(run, *toy_table) == 0
    path = tmp_path / "reports" / "toy.html"
    page, embedded = read_page(path)
    one, seven, gone = page["rows"]
    assert page["columns"][0]["title"] == "PSNR, dB"
    assert one["cells"][0] == {
        "value": 36.0,
        "text": "36.0",
        "marks": "",
        "spread": "[35.4, 36.6]",
        "best": False,
    }
    assert (one["has_results"], one["fill_command"]) == (True, "")
    assert {stage["state"] for stage in one["stages"]} == {"in the store"}
    assert (
        one["command"] == f"python -m pipelines.run stages=toy '{toy_table[1]}' outputs={tmp_path}"
    )
    assert "_target_: tests.helpers.toy.Generate\n  seed: 42\n" in one["config"]
    assert one["blocks"] == [{"unit": f"transformer_blocks.{k}", "error": 0.01} for k in range(2)]
    layers = embedded["layers-0"]
    assert layers["sqnr"] == {
        "layers": ["proj_out"],
        "timesteps": [999, 1],
        "values": [[30.5, 20.5]],
    }
    assert layers["curves"][0] == {
        "unit": "transformer_blocks.0",
        "step": [0, 1, 2],
        "error": [1, 0.5, 0.3333],
    }
    colours = [decode_image(text).getpixel((0, 0)) for text in embedded[one["images"]]]
    assert colours == [(20 * i, 42, 0) for i in range(10)]
    assert page["prompts"][3] == {"text": "a red circle, number 3", "seed": 42, "group": None}
    assert one["scores"]["psnr"] == [36.0] * 10

    assert (seven["has_results"], seven["images"]) == (False, None)
    states = {stage["name"]: stage["state"] for stage in seven["stages"]}
    stored = dict.fromkeys(["capture", "reconstruct", "activate"], "in the store")
    assert states == stored | dict.fromkeys(["generate", "reference", "score"], "missing")
    assert seven["fill_command"].endswith(
        f"outputs={tmp_path} 'targets=[generate,reference,score]'"
    )
    assert gone["problem"].startswith("there is nothing at '/no/such/folder'")
    assert page["fill_command"]["text"].startswith("1 of 3 rows are in the store.")
    text = capfd.readouterr().out
    assert f"{path} (" in text
    assert "The page lacks results of 2 of 3 rows." in text


def test_histograms_are_offered_on_request(run: Run, tmp_path: Path, capfd):
    """A page without them is complete."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    stage = "{_target_: tests.helpers.toy.Activate, version: 1, needs: {}}"
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture: {images: 2}\nrows:\n"
        f"  - {{label: One, overrides: [stages=toy, '+stages.histograms={stage}']}}\n"
    )
    paths = f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"
    assert run("stages=toy", paths) == 0
    assert write_report(run, "table=toy", paths) == 0
    text = capfd.readouterr().out
    assert "The page is complete but for histograms of the values in 1 of 1 rows" in text
    assert "lacks" not in text
    assert text.rstrip().endswith("run_missing=true jobs=2")


def test_its_commands_make_missing_results(run: Run, toy_table: list[str], tmp_path: Path, capfd):
    assert write_report(run, *toy_table, "run_missing=true") == 1
    assert "1 of 3 rows failed: Gone" in capfd.readouterr().err
    one, seven, gone = read_page(tmp_path / "reports" / "toy.html")[0]["rows"]
    assert [r["fill_command"] == "" for r in (one, seven, gone)] == [True, True, False]
    # The images are removed, and their score stays.
    shutil.rmtree(next((tmp_path / "store" / "generate").glob("[!.]*[!k]")))
    assert write_report(run, *toy_table) == 0
    rows = read_page(tmp_path / "reports" / "toy.html")[0]["rows"]
    (fill,) = (r["fill_command"] for r in rows[:2] if r["fill_command"])
    assert fill.endswith("'targets=[generate]'")


def test_old_versions_and_damage_are_reported(run: Run, toy_table: list[str], tmp_path: Path):
    for seed in (42, 7):
        assert run("stages=toy", toy_table[1], f"generation.seed={seed}") == 0
    (score,) = (
        p
        for p in (tmp_path / "store" / "score").iterdir()
        if (p / "metrics.json").is_file() and is_first(p)
    )
    manifest = json.loads((score / "manifest.json").read_text())
    manifest["config"]["version"] = 0
    (score / "manifest.json").write_text(json.dumps(manifest))
    score.rename(score.with_name("0123456789abcdef"))
    for curve in (tmp_path / "store" / "reconstruct").glob("*/curve.csv"):
        curve.write_text(curve.read_text().replace("1.0", "1.5"))
    assert write_report(run, *toy_table) == 0
    states: dict[str, set[str]] = {}
    for row in read_page(tmp_path / "reports" / "toy.html")[0]["rows"]:
        for stage in row["stages"]:
            states.setdefault(stage["name"], set()).add(stage["state"])
    assert "damaged" in states["reconstruct"]
    assert "missing; version 0 is stored, and this is version 1" in states["score"]


def is_first(score: Path) -> bool:
    """Return whether a folder is the first one of its stage by name."""
    return score == sorted(p for p in score.parent.iterdir() if p.is_dir())[0]


def test_a_page_of_an_empty_store_says_how_to_fill_it(
    run: Run, toy_table: list[str], tmp_path: Path
):
    assert write_report(run, *toy_table) == 0
    page, _ = read_page(tmp_path / "reports" / "toy.html")
    assert page["fill_command"]["text"].startswith("0 of 3 rows are in the store.")
    assert page["fill_command"]["command"].startswith("python -m pipelines.report table=toy")
    assert [r["has_results"] for r in page["rows"]] == [False] * 3
    assert page["prompts"] == []


def test_a_page_that_is_too_large_is_refused(run: Run, toy_table: list[str], tmp_path: Path, capfd):
    """Keep the old page if the new one would be too large."""
    assert run("stages=toy", toy_table[1]) == write_report(run, *toy_table) == 0
    before = (tmp_path / "reports" / "toy.html").read_bytes()
    assert write_report(run, *toy_table, "report.megabytes=0.0001") == 1
    error = capfd.readouterr().err
    assert (
        "take more than report.megabytes=0.0001, with 10 prompts of at most 512 pixels: give a "
        "smaller" in error
    )
    assert "Traceback" not in error
    assert (tmp_path / "reports" / "toy.html").read_bytes() == before
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["toy.html"]
    assert write_report(run, *toy_table, "report.pixels=0") == 1
    assert "error: report.pixels=0: give a number above 0" in capfd.readouterr().err


def test_the_same_store_gives_the_same_page(run: Run, toy_table: list[str], tmp_path: Path):
    assert run("stages=toy", toy_table[1]) == write_report(run, *toy_table) == 0
    before = (tmp_path / "reports" / "toy.html").read_bytes()
    assert write_report(run, *toy_table) == 0
    assert (tmp_path / "reports" / "toy.html").read_bytes() == before


def test_no_text_ends_its_script():
    scripts = Scripts(embed_json("x", {HOSTILE: [HOSTILE, float("inf")]}))
    assert scripts.tags == ["script"]
    assert json.loads(scripts.texts["x"]) == {HOSTILE: [HOSTILE, None]}


def test_names_and_prompts_are_only_data(tmp_path: Path):
    folder = draw_images(tmp_path / "a", {(HOSTILE, 1): (0, 0, 0)})
    metrics = {
        "n": 1,
        "metrics": {"psnr": {"mean": 30.0, "low": 29.0, "high": 31.0}},
        "scalars": {},
    }
    row = make_scored_row(HOSTILE, metrics, [{"prompt": HOSTILE, "seed": 1}], group=HOSTILE)
    table = Table(
        [row], [TableColumn("psnr", HOSTILE, per_image=True, better="higher")], question=HOSTILE
    )
    data = RowData(row, HOSTILE, HOSTILE, images=folder, reference=folder)
    text = "".join(render_page(HOSTILE, table, [data], ReportImages([data]), {}, HOSTILE, HOSTILE))
    scripts = Scripts(text)
    assert scripts.tags.count("script") == 5  # plotly, images, layers, report, and the page's own
    assert json.loads(scripts.texts["report"])["rows"][0]["label"] == HOSTILE
    assert "<script>alert" not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text.split('<script type="text/plain"')[0])


def draw_images(
    folder: Path, images: dict[tuple[str, int], tuple[int, int, int]], size: int = 8
) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images.json").write_text(json.dumps([{"prompt": p, "seed": s} for p, s in images]))
    for i, colour in enumerate(images.values()):
        Image.new("RGB", (size, size), colour).save(folder / "images" / f"{i:05}.png")
    return folder


def make_scored_data(folder: Path, values: dict[tuple[str, int], float]) -> RowData:
    images = [{"prompt": p, "seed": s} for p, s in values]
    metrics = {
        "n": len(values),
        "metrics": {},
        "scalars": {},
        "per_image": {"psnr": list(values.values())},
    }
    return RowData(make_scored_row("A", metrics, images), "", images=folder)


def empty_row(count: int) -> ScoredRow:
    return make_scored_row("A", {"n": count, "metrics": {}, "scalars": {}})


def decode_image(text: str | None) -> Image.Image:
    """Return an image that the page contains as base64."""
    return Image.open(io.BytesIO(base64.b64decode(text or ""))).convert("RGB")


def read_red(text: str | None) -> Any:
    """Return the red value of the first pixel of an image, or None if there is no image."""
    pixel: Any = decode_image(text).getpixel((0, 0)) if text else None
    return pixel and pixel[0]


class TestImages:
    def test_images_are_aligned_by_prompt_and_seed(self, tmp_path: Path):
        a = draw_images(tmp_path / "a", {("x", 1): (10, 0, 0), ("y", 2): (20, 0, 0)})
        b = draw_images(tmp_path / "b", {("y", 2): (30, 0, 0), ("x", 3): (40, 0, 0)})
        images_of_row = ReportImages([RowData(empty_row(2), "", images=a, reference=b)])
        assert images_of_row.shown_keys == [("y", 2), ("x", 3), ("x", 1)]
        blocks = dict(images_of_row.encode_folders())
        assert [read_red(text) for text in blocks[a]] == [20, None, 10]
        assert [read_red(text) for text in blocks[b]] == [30, 40, None]

    def test_the_worst_of_too_many_prompts_are_shown(self, tmp_path: Path):
        images = {(f"p{i}", i): (0, 0, 0) for i in range(6)}
        values = dict(zip(images, [30.0, 20.0, 40.0, 10.0, 35.0, 25.0], strict=True))
        data = make_scored_data(draw_images(tmp_path / "a", images), values)
        for higher_is_better, seeds in ((True, [1, 3, 5]), (False, [0, 2, 4])):
            shown = ReportImages([data], ImageLimits(prompts=3), "psnr", higher_is_better)
            assert [seed for _, seed in shown.shown_keys] == seeds
            assert "The 3 prompts of 6 with the worst mean" in shown.describe_encoding()

    @pytest.mark.parametrize(("size", "exact"), [(128, True), (160, False)])
    def test_small_images_are_exact_and_large_ones_shrink(
        self, tmp_path: Path, size: int, exact: bool
    ):
        folder = draw_images(tmp_path / "a", {("p", 0): (0, 0, 0)}, size)
        noise = Image.effect_noise((size, size), 80).convert("RGB")
        noise.save(folder / "images" / "00000.png")
        data = RowData(empty_row(1), "", images=folder)
        _, (text,) = next(ReportImages([data]).encode_folders())
        shown = decode_image(text)
        assert (ImageChops.difference(shown, noise).getbbox() is None) == exact
        _, (text,) = next(ReportImages([data], ImageLimits(pixels=50)).encode_folders())
        assert decode_image(text).size == (50, 50)

    @pytest.mark.parametrize(("frames", "shown"), [(24, 5), (3, 3)])
    def test_videos_show_their_first_frames_below_each_other(
        self, tmp_path: Path, frames: int, shown: int
    ):
        folder = draw_images(tmp_path / "a", {("p", 0): (0, 0, 0), ("q", 1): (0, 0, 0)})
        video = torch.randint(256, (5, 3, 6, 8)) / 255
        save_image(video, folder / "images" / "00000.png")
        save_image(video[:2], folder / "images" / "00001.png")  # which is shorter
        data = RowData(empty_row(2), "", images=folder)
        images = ReportImages([data], ImageLimits(frames=frames))
        assert images.num_frames == shown
        _, (text, short) = next(images.encode_folders())
        stacked = to_tensor(decode_image(text)).unflatten(1, (shown, 6)).movedim(1, 0)
        assert torch.equal(stacked, video[:shown])
        assert decode_image(short).size == decode_image(text).size
        said = "Videos show their first 3 frames of 5; scores are of all frames."
        assert (said in images.describe_encoding()) == (shown < 5)
        table = Table([data.scored], [TableColumn("psnr", "PSNR", per_image=True)])
        report = Scripts("".join(render_page("t", table, [data], images, {}))).texts["report"]
        assert json.loads(report)["frames"] == shown

    def test_frames_are_no_more_than_webp_can_hold(self, tmp_path: Path):
        folder = draw_images(tmp_path / "a", {("p", 0): (0, 0, 0)})
        save_image(torch.rand(9, 3, 4000, 2), folder / "images" / "00000.png")
        limits = ImageLimits(pixels=4000)
        images = ReportImages([RowData(empty_row(1), "", images=folder)], limits)
        assert images.num_frames == 4
        _, (text,) = next(images.encode_folders())
        assert decode_image(text).height == 16000

    @pytest.mark.parametrize("field", ["prompts", "pixels", "quality", "megabytes", "frames"])
    def test_a_limit_that_allows_nothing_is_refused(self, field: str):
        with pytest.raises(UserError, match=rf"report\.{field}=0"):
            ImageLimits(**{field: 0})


def test_the_front_has_all_points_that_no_other_beats():
    points = list(product([1, 2, 3, 3], [5, 1, 4, 2, 5]))
    costs, values = zip(*points, strict=True)

    def is_beaten(point: tuple[int, int]) -> bool:
        cost, value = point
        return any(c <= cost and v >= value and (c, v) != point for c, v in points)

    front = find_pareto_front(costs, values)
    assert sorted(front) == [i for i, point in enumerate(points) if not is_beaten(point)]
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_the_front_is_below_if_lower_is_better():
    column, cost = (
        TableColumn("fid", "FID", per_set=True, better="lower"),
        TableColumn("bits_weight", "Bits W"),
    )
    rows = [
        make_scored_row(
            str(bits),
            {
                "n": 9,
                "metrics": {"fid": {"mean": fid, "low": fid, "high": fid}},
                "scalars": {"bits_weight": bits},
            },
        )
        for bits, fid in ((4, 30.0), (3, 40.0), (5, 35.0), (6, 20.0))
    ]
    (plot,) = make_front_plots(Table(rows, [column]), {"bits_weight": cost})
    assert [plot["points"][k]["x"] for k in plot["front"]] == [3, 4, 6]


def test_a_lossless_layer_has_no_decibels():
    lines = [
        {"layer": "a", "timestep": "10.0", "sqnr_db": "inf"},
        {"layer": "a", "timestep": "900.0", "sqnr_db": "31.26"},
    ]
    data = RowData(empty_row(0), "", sqnr=lines)
    assert make_sqnr_plot(data) == {
        "layers": ["a"],
        "timesteps": [900, 10],
        "values": [[31.3, None]],
    }
    assert find_sqnr_range([data]) == [31.3, 31.3]
    assert make_learning_curves(data) == []
