"""Prompts of every published layout, compared with what was written, with the csv module or with string splitting."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hydra.utils import instantiate

import pipelines.inspect
from fp4dit.errors import UserError
from fp4dit.prompts import Prompt, coco, from_file, grouped, shapes, shared, texts
from fp4dit.store import Store
from pipelines.disjoint import check_disjoint
from pipelines.plan import execute, plan
from pipelines.resolvers import options
from pipelines.runtime import Runtime
from tests.conftest import Compose, Run

# From the published file, cut short: it quotes nothing, and one prompt begins with a quotation mark of its own.
PARTI = """Prompt\tCategory\tChallenge\tNote
"G I G G L E" painted in thick colorful lettering as graffiti on a faded red brick wall\tIllustrations\tWriting\t
a cartoon of a dog saying "I see what you did there"\tAnimals\tWriting\t
 A sloth in a go kart on a race track.\tAnimals\tFine-grained Detail\t
42\tAbstract\tBasic\tSimple numbers but challenging
7 dogs sitting around a poker table\tAnimals\tQuantity\tDescription of "Dogs Playing Poker"
"""
STYLES = ("anime", "concept-art", "paintings", "photo")


def write(path: Path, value: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def captions(images: int, each: int, name: str = "") -> dict[str, list[dict[str, object]]]:
    """A file of COCO's, the annotations shuffled: caption j of image i is `i-j`, its id the higher the higher j."""
    ids = [1000 - 7 * i for i in range(images)]
    found = [
        {"image_id": image, "id": 10 * image + j, "caption": f"{name}{i}-{j} \n"}
        for i, image in enumerate(ids)
        for j in range(each)
    ]
    Random(0).shuffle(found)
    return {"images": [{"id": image, "file_name": f"{image:012}.jpg"} for image in ids], "annotations": found}


class TestCoco:
    def test_the_first_captions_are_those_of_the_file(self, tmp_path: Path):
        data = captions(5, 5)
        path = write(tmp_path / "captions.json", data)
        assert texts(coco(7, path)) == [str(a["caption"]).strip() for a in data["annotations"][:7]]
        assert texts(coco(3, path, start=4)) == texts(coco(7, path))[4:]

    def test_of_each_image_the_caption_that_was_written_first(self, tmp_path: Path):
        path = write(tmp_path / "captions.json", captions(5, 5))
        assert texts(coco(5, path, per_image=True)) == [f"{i}-0" for i in range(5)]

    def test_an_image_without_a_caption_is_passed_over(self, tmp_path: Path):
        data = captions(3, 2)
        bare = data["images"][1]["id"]
        data["annotations"] = [a for a in data["annotations"] if a["image_id"] != bare]
        assert texts(coco(2, write(tmp_path / "captions.json", data), per_image=True)) == ["0-0", "2-0"]

    def test_sentences_of_the_other_split_are_passed_over(self, tmp_path: Path):
        train, val = captions(4, 1), captions(2, 1, "val ")
        val["annotations"][0]["caption"] = f"  {str(train['annotations'][1]['caption']).upper()}"
        paths = [write(tmp_path / name, data) for name, data in (("train.json", train), ("val.json", val))]
        kept = [str(a["caption"]).strip() for i, a in enumerate(train["annotations"]) if i != 1]
        assert texts(coco(3, paths[0], other_path=paths[1])) == kept

    @pytest.mark.parametrize(
        "data",
        [
            ["a cat"],
            {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}]},
            {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": 7}]},
        ],
    )
    def test_another_layout(self, tmp_path: Path, data: object):
        with pytest.raises(UserError, match=r"is no file of COCO's captions, which look like \{\"images\""):
            coco(1, write(tmp_path / "instances.json", data))


class TestFile:
    def test_lines(self, tmp_path: Path):
        path = write(tmp_path / "prompts.txt", "\ufeffa cat\n\n  a \u2028dog \r\nan owl")
        assert from_file(3, path) == [Prompt("a cat"), Prompt("a \u2028dog"), Prompt("an owl")]

    def test_parti(self, tmp_path: Path):
        path = write(tmp_path / "PartiPrompts.tsv", PARTI)
        cells = [line.split("\t") for line in PARTI.splitlines()[1:]]
        assert texts(from_file(5, path, "Prompt")) == [cell[0].strip() for cell in cells]
        drawn = from_file(5, path, "Prompt", "Category")
        assert [p.group for p in drawn] == ["Illustrations", "Animals", "Abstract", "Animals", "Animals"]
        assert {(p.text, p.group) for p in drawn} == {(cell[0].strip(), cell[1]) for cell in cells}

    def test_csv_as_the_csv_module_writes_it(self, tmp_path: Path):
        rows = [("n", "caption"), (1, 'a sign: "stop", twice'), (2, "two\nlines"), (3, "a\ttab")]
        with open(tmp_path / "prompts.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        assert texts(from_file(3, str(tmp_path / "prompts.csv"), "caption")) == [text for _, text in rows[1:]]

    def test_mjhq(self, tmp_path: Path):
        data = {f"{i:040x}": {"category": "food" if i < 6 else "plants", "prompt": f"{i}"} for i in range(8)}
        drawn = from_file(4, write(tmp_path / "meta_data.json", data), group="category")
        assert drawn == [Prompt("0", "food"), Prompt("6", "plants"), Prompt("1", "food"), Prompt("7", "plants")]
        assert Counter(from_file(8, str(tmp_path / "meta_data.json"), group="category")) == Counter(
            Prompt(value["prompt"], value["category"]) for value in data.values()
        )

    def test_fewer_begin_with_the_same_prompts(self, tmp_path: Path):
        path = write(tmp_path / "a.json", [{"prompt": str(i), "of": str(i % 3)} for i in range(20)])
        assert all(from_file(n, path, group="of") == from_file(20, path, group="of")[:n] for n in range(20))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\n", "holds 1 prompts, 2 are asked for"),
        ("a.csv", "text,n\na,1\nb,2\n", r"record 1 has no text in its field 'prompt'; its fields are 'text', 'n'"),
        ("a.tsv", "prompt\tn\na\t1\n \t2\n", "record 2 has no text in its field 'prompt'"),
        ("a.csv", "prompt\na red, round cat\nb\n", "line 2: more cells than in the header"),
        ("a.json", '["a",\n "b"\n "c"]', r"line 3: this is no JSON: Expecting ',' delimiter"),
        ("a.json", [{"prompt": "a"}, {"prompt": 7}], "record 2 has no text in its field 'prompt'"),
        ("a.json", ["a", ""], "record 2 has no text"),
        ("a.json", {"prompts": ["a", "b"]}, "must be a list of strings, a list of objects or an object of objects"),
        ("a.json", ["a", {"prompt": "b"}], "must be a list of strings"),
        ("a.parquet", "", "ends in .txt, .json, .csv or .tsv"),
    ],
)
def test_a_mistake_in_a_file_gets_one_message(tmp_path: Path, name: str, content: object, message: str):
    with pytest.raises(UserError, match=message):
        from_file(2, write(tmp_path / name, content))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file of prompts at nowhere\.txt"):
        from_file(1, "nowhere.txt")
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8: byte 5"):
        from_file(1, str(tmp_path / "a.txt"))
    path = write(tmp_path / "b.txt", "a\nb\nc")
    with pytest.raises(UserError, match="holds 1 prompts after the first 2, 2 are asked for"):
        from_file(2, path, start=2)


@pytest.mark.parametrize(("count", "each"), [(8, [2, 2, 2, 2]), (6, [2, 2, 1, 1]), (3, [1, 1, 1, 0])])
def test_a_set_of_sets_is_drawn_from_evenly(count: int, each: list[int]):
    sets = {style: lambda n, style=style: [Prompt(f"{style} {i}") for i in range(n)] for style in STYLES}
    drawn = grouped(count, sets)
    assert [sum(p.group == style for p in drawn) for style in STYLES] == each
    assert all(p.text.startswith(f"{p.group} ") for p in drawn)
    assert drawn == grouped(8, sets)[:count]


def test_what_two_sets_share():
    one, other = ([Prompt(text) for text in given] for given in (["A  cat ", "a dog", "a cat"], ["a\tCat", "an owl"]))
    assert shared(one, other) == ["A  cat ", "a cat"]
    assert shared(other, [Prompt("a dog")]) == []


def test_both_sides_of_the_shapes_share_nothing():
    assert shared(shapes(2000, held_out=False), shapes(2000, held_out=True)) == []


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny files where the options of conf/prompts look for theirs; COCO's splits have two sentences in common."""
    monkeypatch.chdir(tmp_path)
    for year in (2014, 2017):
        for split in ("train", "val"):
            found = captions(200, 1, f"{split} ")
            for annotation, text in zip(found["annotations"], ("a man riding a wave", "a plane"), strict=False):
                annotation["caption"] = text
            write(tmp_path / f"data/coco/annotations/captions_{split}{year}.json", found)
    for style in STYLES:
        write(tmp_path / f"data/hpsv2/{style}.json", [f"{style} {i}" for i in range(4)])
    write(tmp_path / "data/pixart/samples.txt", "\n".join(f"sample {i}" for i in range(4)))
    write(tmp_path / "data/parti/PartiPrompts.tsv", PARTI)
    write(
        tmp_path / "data/mjhq_30k/meta_data.json",
        {"ab": {"category": "food", "prompt": "soup"}}
        | {str(i): {"category": "art", "prompt": f"art {i}"} for i in range(4)},
    )
    write(tmp_path / "own.csv", "prompt,kind\n" + "".join(f"own {i},kind {i % 2}\n" for i in range(200)))
    return tmp_path


OWN = ["prompts.calibration.path=own.csv", "prompts.evaluation.path=own.csv", "prompts.calibration.start=4"]
GIVEN = {"file": OWN}
GROUPS = {"hpsv2": set(STYLES), "parti": {"Illustrations", "Animals", "Abstract"}, "mjhq_30k": {"food", "art"}}


@pytest.mark.parametrize("option", options("prompts"))
def test_every_set_is_planned_drawn_and_apart_from_its_calibration(composed: Compose, data: Path, option: str):
    cfg = composed(f"prompts={option}", "prompts.count=4", *GIVEN.get(option, []))
    steps = plan(cfg)
    check_disjoint(cfg, steps)
    drawn = instantiate(cfg.prompts.evaluation, _convert_="all")(4)
    assert len(drawn) == 4
    assert {p.group for p in drawn} == GROUPS.get(option, {None})
    assert steps["generate"].make().prompts(4) == drawn
    calibrated = steps["capture"].make().calibration.drawn
    assert len(calibrated) == 136
    if option != "classes":
        assert not set(calibrated) & set(texts(drawn))


@pytest.mark.parametrize(
    ("option", "count"),
    [("coco_val2017", 10000), ("coco2014", 30000), ("hpsv2", 3200), ("pixart_120", 120), ("parti", 1632)],
)
def test_the_whole_set_is_asked_for(composed: Compose, option: str, count: int):
    assert composed(f"prompts={option}").prompts.count == count


FETCHED = {
    "coco_val2017": "coco/annotations/captions_val2017.json",
    "coco2014": "coco/annotations/captions_val2014.json",
    "hpsv2": "hpsv2/paintings.json",
    "pixart_120": "pixart/samples.txt",
    "parti": "parti/PartiPrompts.tsv",
    "mjhq_30k": "mjhq_30k/meta_data.json",
}


def test_every_set_of_files_is_among_those_that_are_fetched():
    assert set(options("prompts")) - set(FETCHED) == {"shapes", "classes", "file"}


@pytest.mark.parametrize("option", FETCHED)
def test_a_file_that_is_not_there_is_said_to_be_fetched_from_somewhere(composed: Compose, data: Path, option: str):
    missing = data / "data" / FETCHED[option]
    missing.unlink()
    with pytest.raises(UserError) as told:
        plan(composed(f"prompts={option}"))
    assert str(told.value).startswith(f"there is no file at data/{FETCHED[option]}. ")
    assert missing.name in str(told.value).partition(". ")[2]
    assert re.search(r"(\.org|\.co|github\.com/\S+)\b.*: (unpack|put) .*, or give prompts\.\S+=\.\.\.", str(told.value))


def test_calibration_and_evaluation_are_found_to_overlap_before_the_first_stage(
    run: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    own = f"{data}/own.csv"
    given = ["prompts=file", f"prompts.calibration.path={own}", f"prompts.evaluation.path={own}"]
    assert run(*given, "prompts.count=3", "prompts.evaluation.start=130") == 1
    told = capsys.readouterr().err
    assert (
        "error: 3 of the 136 prompts to calibrate on are also drawn for the score, such as 'own 130' and 'own 131'"
        in told
    )
    assert "prompts.calibration.path=... or, further on in the same file, prompts.calibration.start=..." in told
    assert run(*given, "prompts.count=3", "prompts.evaluation.start=130", main=pipelines.inspect.main) == 1
    assert "3 of the 136 prompts" in capsys.readouterr().err
    assert not (tmp_path / "store" / "capture").exists()


def test_what_calibrates_on_nothing_may_draw_anything(composed: Compose, data: Path):
    overlap = [*OWN[:2], "prompts=file", "prompts.count=3"]
    for free in ("method=fp16", "+prompts.disjoint=false"):
        cfg = composed(*overlap, free)
        check_disjoint(cfg, plan(cfg))
    cfg = composed(*overlap)
    with pytest.raises(UserError, match="3 of the 136 prompts"):
        check_disjoint(cfg, plan(cfg))
    assert {s.key for s in plan(cfg).values()} == {s.key for s in plan(composed(*overlap, free)).values()}


@pytest.mark.unchecked
def test_prompt_seed_and_group_are_stored_whatever_the_chunk(
    composed: Compose, data: Path, pixart_folder: Path, tmp_path: Path
):
    given = ["method=fp16", f"model.path={pixart_folder}", "generation.steps=1", "prompts.count=5"]
    stored = {}
    for option, chunk in [("hpsv2", 1), ("hpsv2", 2), ("hpsv2", 8), ("shapes", 8)]:
        steps = plan(composed(*given, f"prompts={option}", f"generation.chunk={chunk}"))
        made = execute(steps, ["reference"], Store(tmp_path / "store"), Runtime())["reference"]
        stored[option, chunk] = (made / "images.json").read_text()
    styles = [*STYLES, "anime"]
    expected = [{"prompt": f"{style} {i // 4}", "seed": 42 + i, "group": style} for i, style in enumerate(styles)]
    assert all(json.loads(stored["hpsv2", chunk]) == expected for chunk in (1, 2, 8))
    plain = [{"prompt": text, "seed": 42 + i} for i, text in enumerate(texts(shapes(5, held_out=True)))]
    assert stored["shapes", 8] == json.dumps(plain, indent=1)
