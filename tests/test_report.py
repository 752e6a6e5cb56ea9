"""The page of a table: what is in it, what is missing, what it refuses. tests/browser looks at it."""

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
from PIL import Image, ImageChops

import pipelines.report
from fp4dit.errors import UserError
from fp4dit.report.album import Album, Limits
from fp4dit.report.material import Material
from fp4dit.report.page import embedded, page
from fp4dit.report.plots import curves, fronts, pareto, span, sqnr
from fp4dit.rows import Column, row
from fp4dit.tables import Table
from tests.conftest import ROOT, Run

HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \"'&🙂"


class Scripts(HTMLParser):
    """Script elements by id, as a browser would tell them apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
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
            self.found[self.inside] = self.found.get(self.inside, "") + data


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's own data, and all else that is embedded."""
    scripts = Scripts(path.read_text()).found
    parsed = {name: json.loads(text) for name, text in scripts.items() if name not in ("", "plotly")}
    return parsed["report"], parsed


@pytest.fixture
def toy(tmp_path: Path) -> list[str]:
    """A table of two rows of toy stages, and one of a model that is not here."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture_prompts: 2\nquestion: Which?\nrows:\n"
        "  - {label: One, overrides: [stages=toy]}\n"
        "  - {label: Seven, group: Seeds, overrides: [stages=toy, generation.seed=7]}\n"
        "  - {label: Gone, overrides: [model=generic, model.path=/no/such/folder]}\n"
    )
    return ["table=toy", f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"]


def report(run: Run, *given: str) -> int:
    return run(*given, main=pipelines.report.main)


def test_a_page_holds_what_the_store_does_and_says_what_it_lacks(run: Run, toy: list[str], tmp_path: Path, capfd):
    assert run("stages=toy", toy[1]) == 0
    assert report(run, *toy) == 0
    path = tmp_path / "reports" / "toy.html"
    found, others = read(path)
    one, seven, gone = found["rows"]
    assert found["columns"][0]["title"] == "PSNR, dB"
    assert one["cells"][0] == {"value": 36.0, "text": "36.0", "marks": "", "spread": "[35.4, 36.6]", "best": False}
    assert (one["there"], one["fill"]) == (True, "")
    assert {stage["state"] for stage in one["stages"]} == {"in the store"}
    assert one["command"] == f"python -m pipelines.run stages=toy '{toy[1]}' outputs={tmp_path}"
    assert "_target_: tests.toy.Generate\n  seed: 42\n" in one["config"]
    assert one["blocks"] == [{"unit": f"transformer_blocks.{k}", "error": 0.01} for k in range(2)]
    layers = others["layers-0"]
    assert layers["sqnr"] == {"layers": ["proj_out"], "timesteps": [999, 1], "values": [[30.5, 20.5]]}
    assert layers["curves"][0] == {"unit": "transformer_blocks.0", "step": [0, 1, 2], "error": [1, 0.5, 0.3333]}
    images = [Image.open(io.BytesIO(base64.b64decode(text))) for text in others[one["images"]]]
    assert [image.convert("RGB").getpixel((0, 0)) for image in images] == [(20 * i, 42, 0) for i in range(10)]
    assert found["prompts"][3] == {"text": "a red circle, number 3", "seed": 42, "group": None}
    assert one["scores"]["psnr"] == [36.0] * 10

    assert (seven["there"], seven["images"]) == (False, None)
    states = {stage["name"]: stage["state"] for stage in seven["stages"]}
    assert states == dict.fromkeys(["capture", "reconstruct", "activate"], "in the store") | dict.fromkeys(
        ["generate", "reference", "score"], "missing"
    )
    assert seven["fill"].endswith(f"outputs={tmp_path} 'targets=[generate,reference,score]'")
    assert gone["problem"].startswith("there is nothing at '/no/such/folder'")
    assert found["fill"]["text"].startswith("1 of 3 rows are in the store.")
    text = capfd.readouterr().out
    assert f"{path} (" in text
    assert "It lacks something of 2 of 3 rows." in text


def test_its_commands_make_what_is_missing(run: Run, toy: list[str], tmp_path: Path, capfd):
    assert report(run, *toy, "run_missing=true") == 1
    assert "1 of 3 rows failed: Gone" in capfd.readouterr().err
    one, seven, gone = read(tmp_path / "reports" / "toy.html")[0]["rows"]
    assert [r["fill"] == "" for r in (one, seven, gone)] == [True, True, False]
    shutil.rmtree(next((tmp_path / "store" / "generate").glob("[!.]*[!k]")))  # images alone, whose score is there
    assert report(run, *toy) == 0
    rows = read(tmp_path / "reports" / "toy.html")[0]["rows"]
    (fill,) = (r["fill"] for r in rows[:2] if r["fill"])
    assert fill.endswith("'targets=[generate]'")


def test_what_an_older_version_made_and_what_is_damaged_is_told(run: Run, toy: list[str], tmp_path: Path):
    assert run("stages=toy", toy[1]) == run("stages=toy", toy[1], "generation.seed=7") == 0
    (score,) = (p for p in (tmp_path / "store" / "score").iterdir() if (p / "metrics.json").is_file() and first(p))
    manifest = json.loads((score / "manifest.json").read_text())
    manifest["config"]["version"] = 0
    (score / "manifest.json").write_text(json.dumps(manifest))
    score.rename(score.with_name("0123456789abcdef"))
    for curve in (tmp_path / "store" / "reconstruct").glob("*/curve.csv"):
        curve.write_text(curve.read_text().replace("1.0", "1.5"))
    assert report(run, *toy) == 0
    stages = {s["name"]: s["state"] for r in read(tmp_path / "reports" / "toy.html")[0]["rows"] for s in r["stages"]}
    assert stages["reconstruct"] == "damaged"
    states = {s["state"] for r in read(tmp_path / "reports" / "toy.html")[0]["rows"] for s in r["stages"]}
    assert "missing; of version 0 there is one, this is 1" in states


def first(score: Path) -> bool:
    return score == sorted(p for p in score.parent.iterdir() if p.is_dir())[0]


def test_of_an_empty_store_the_page_says_how_to_fill_it(run: Run, toy: list[str], tmp_path: Path):
    assert report(run, *toy) == 0
    found, _ = read(tmp_path / "reports" / "toy.html")
    assert found["fill"]["text"].startswith("0 of 3 rows are in the store.")
    assert found["fill"]["command"].startswith("python -m pipelines.report table=toy")
    assert [r["there"] for r in found["rows"]] == [False] * 3
    assert found["prompts"] == []


def test_a_page_that_would_be_too_large_is_refused_and_the_old_one_stays(
    run: Run, toy: list[str], tmp_path: Path, capfd
):
    assert run("stages=toy", toy[1]) == report(run, *toy) == 0
    before = (tmp_path / "reports" / "toy.html").read_bytes()
    assert report(run, *toy, "report.megabytes=0.0001") == 1
    error = capfd.readouterr().err
    assert "take more than report.megabytes=0.0001, with 10 prompts of at most 512 pixels: give a smaller" in error
    assert "Traceback" not in error
    assert (tmp_path / "reports" / "toy.html").read_bytes() == before
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["toy.html"]
    assert report(run, *toy, "report.pixels=0") == 1
    assert "error: report.pixels=0: give a number above 0" in capfd.readouterr().err


def test_the_same_store_gives_the_same_page(run: Run, toy: list[str], tmp_path: Path):
    assert run("stages=toy", toy[1]) == report(run, *toy) == 0
    first = (tmp_path / "reports" / "toy.html").read_bytes()
    assert report(run, *toy) == 0
    assert (tmp_path / "reports" / "toy.html").read_bytes() == first


def test_no_text_ends_its_script():
    scripts = Scripts(embedded("x", {HOSTILE: [HOSTILE, float("inf")]}))
    assert scripts.tags == ["script"]
    assert json.loads(scripts.found["x"]) == {HOSTILE: [HOSTILE, None]}


def test_names_and_prompts_are_data_alone(tmp_path: Path):
    folder = drawn(tmp_path / "a", {(HOSTILE, 1): (0, 0, 0)})
    metrics = {"n": 1, "metrics": {"psnr": {"mean": 30.0, "low": 29.0, "high": 31.0}}, "scalars": {}}
    own = row(HOSTILE, metrics, [{"prompt": HOSTILE, "seed": 1}], group=HOSTILE)
    table = Table([own], [Column("psnr", HOSTILE, interval=True, better="higher")], question=HOSTILE)
    material = Material(own, HOSTILE, HOSTILE, images=folder, reference=folder)
    text = "".join(page(HOSTILE, table, [material], Album([material]), {}, HOSTILE, HOSTILE))
    scripts = Scripts(text)
    assert scripts.tags.count("script") == 5  # plotly, images, layers, report, and the page's own
    assert json.loads(scripts.found["report"])["rows"][0]["label"] == HOSTILE
    assert "<script>alert" not in text
    assert not re.search(r'(src|href)="(?!#|data:)', text.split('<script type="text/plain"')[0])


def drawn(folder: Path, images: dict[tuple[str, int], tuple[int, int, int]], size: int = 8) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "images.json").write_text(json.dumps([{"prompt": p, "seed": s} for p, s in images]))
    for i, colour in enumerate(images.values()):
        Image.new("RGB", (size, size), colour).save(folder / "images" / f"{i:05}.png")
    return folder


def scored(folder: Path, values: dict[tuple[str, int], float]) -> Material:
    images = [{"prompt": p, "seed": s} for p, s in values]
    metrics = {"n": len(values), "metrics": {}, "scalars": {}, "per_image": {"psnr": list(values.values())}}
    return Material(row("A", metrics, images), "", images=folder)


class TestAlbum:
    def test_images_stand_beside_those_of_the_same_prompt_and_seed(self, tmp_path: Path):
        a = drawn(tmp_path / "a", {("x", 1): (10, 0, 0), ("y", 2): (20, 0, 0)})
        b = drawn(tmp_path / "b", {("y", 2): (30, 0, 0), ("x", 3): (40, 0, 0)})
        album = Album([Material(row("A", {"n": 2, "metrics": {}, "scalars": {}}), "", images=a, reference=b)])
        assert album.shots == [("y", 2), ("x", 3), ("x", 1)]
        blocks = dict(album.blocks())
        shade = lambda text: text and Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB").getpixel((0, 0))[0]
        assert [shade(text) for text in blocks[a]] == [20, None, 10]
        assert [shade(text) for text in blocks[b]] == [30, 40, None]

    def test_of_too_many_prompts_the_worst_are_shown(self, tmp_path: Path):
        shots = {(f"p{i}", i): (0, 0, 0) for i in range(6)}
        values = dict(zip(shots, [30.0, 20.0, 40.0, 10.0, 35.0, 25.0], strict=True))
        material = scored(drawn(tmp_path / "a", shots), values)
        chosen = lambda **given: [seed for _, seed in Album([material], Limits(prompts=3), "psnr", **given).shots]
        assert chosen() == [1, 3, 5]
        assert chosen(higher_is_better=False) == [0, 2, 4]
        assert "The 3 prompts of 6 with the worst mean" in Album([material], Limits(prompts=3), "psnr").encoding()

    @pytest.mark.parametrize(("size", "exact"), [(128, True), (160, False)])
    def test_small_images_are_exact_and_large_ones_shrink(self, tmp_path: Path, size: int, exact: bool):
        folder = drawn(tmp_path / "a", {("p", 0): (0, 0, 0)}, size)
        noise = Image.effect_noise((size, size), 80).convert("RGB")
        noise.save(folder / "images" / "00000.png")
        (image,) = next(
            Album([Material(row("A", {"n": 1, "metrics": {}, "scalars": {}}), "", images=folder)]).blocks()
        )[1]
        shown = Image.open(io.BytesIO(base64.b64decode(image or ""))).convert("RGB")
        assert (ImageChops.difference(shown, noise).getbbox() is None) == exact
        smaller = Album(
            [Material(row("A", {"n": 1, "metrics": {}, "scalars": {}}), "", images=folder)], Limits(pixels=50)
        )
        shrunk = Image.open(io.BytesIO(base64.b64decode(next(smaller.blocks())[1][0] or "")))
        assert shrunk.size == (50, 50)

    @pytest.mark.parametrize("field", ["prompts", "pixels", "quality", "megabytes"])
    def test_a_limit_that_allows_nothing_is_refused(self, field: str):
        with pytest.raises(UserError, match=rf"report\.{field}=0"):
            Limits(**{field: 0})


def test_the_front_is_what_nothing_beats():
    points = list(product([1, 2, 3, 3], [5, 1, 4, 2, 5]))
    costs, values = zip(*points, strict=True)
    beaten = lambda p: any(c <= p[0] and v >= p[1] and (c, v) != p for c, v in points)
    front = pareto(costs, values)
    assert sorted(front) == [i for i, point in enumerate(points) if not beaten(point)]
    assert [costs[i] for i in front] == sorted(costs[i] for i in front)


def test_a_quality_that_should_be_low_has_its_front_below():
    column, cost = Column("fid", "FID", of_set=True, better="lower"), Column("bits_weight", "Bits W")
    rows = [
        row(
            str(bits),
            {"n": 9, "metrics": {"fid": {"mean": fid, "low": fid, "high": fid}}, "scalars": {"bits_weight": bits}},
        )
        for bits, fid in ((4, 30.0), (3, 40.0), (5, 35.0), (6, 20.0))
    ]
    (found,) = fronts(Table(rows, [column]), {"bits_weight": cost})
    assert [found["points"][k]["x"] for k in found["front"]] == [3, 4, 6]


def test_a_layer_that_loses_nothing_has_no_decibels():
    lines = [
        {"layer": "a", "timestep": "10.0", "sqnr_db": "inf"},
        {"layer": "a", "timestep": "900.0", "sqnr_db": "31.26"},
    ]
    material = Material(row("A", {"n": 0, "metrics": {}, "scalars": {}}), "", sqnr=lines)
    assert sqnr(material) == {"layers": ["a"], "timesteps": [900, 10], "values": [[31.3, None]]}
    assert span([material]) == [31.3, 31.3]
    assert curves(material) == []
