"""Prompts of every published layout, compared with the content that was written."""

import csv
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from fp4dit.data.prompts import (
    Prompt,
    combine_sets,
    find_shared_texts,
    get_texts,
    load_coco_prompts,
    load_prompts,
)
from fp4dit.utils.errors import UserError
from fp4dit.worlds import ShapesWorld
from fp4dit.worlds.prompts import draw_captions
from tests.helpers.prompt_files import HPS_STYLES, PARTI, make_coco_captions, write_file


class TestCoco:
    def test_captions_come_in_file_order(self, tmp_path: Path):
        content = make_coco_captions(5, 5)
        path = write_file(tmp_path / "captions.json", content)
        texts = get_texts(load_coco_prompts(7, path))
        assert texts == [entry["caption"].strip() for entry in content["annotations"][:7]]
        assert get_texts(load_coco_prompts(3, path, start=4)) == texts[4:]

    def test_per_image_takes_the_oldest_caption(self, tmp_path: Path):
        path = write_file(tmp_path / "captions.json", make_coco_captions(5, 5))
        assert get_texts(load_coco_prompts(5, path, per_image=True)) == [f"{i}-0" for i in range(5)]

    def test_an_image_without_a_caption_is_skipped(self, tmp_path: Path):
        content = make_coco_captions(3, 2)
        image_id = content["images"][1]["id"]
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != image_id]
        path = write_file(tmp_path / "captions.json", content)
        assert get_texts(load_coco_prompts(2, path, per_image=True)) == ["0-0", "2-0"]

    def test_captions_of_the_other_split_are_skipped(self, tmp_path: Path):
        """Case and white space make no difference."""
        train, val = make_coco_captions(4, 1), make_coco_captions(2, 1, "val ")
        shared = train["annotations"].pop(1)
        val["annotations"][0]["caption"] = f"  {shared['caption'].upper()}"
        expected = [entry["caption"].strip() for entry in train["annotations"]]
        train["annotations"].insert(1, shared)
        path = write_file(tmp_path / "train.json", train)
        other_path = write_file(tmp_path / "val.json", val)
        assert get_texts(load_coco_prompts(3, path, other_path=other_path)) == expected

    @pytest.mark.parametrize(
        "content",
        [
            ["a cat"],
            {"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}]},
            {"images": [], "annotations": [{"id": 1, "image_id": 1, "caption": 7}]},
        ],
    )
    def test_another_layout_is_refused(self, tmp_path: Path, content: object):
        message = r"is not a file of COCO's captions, which look like \{\"images\""
        with pytest.raises(UserError, match=message):
            load_coco_prompts(1, write_file(tmp_path / "instances.json", content))


class TestFile:
    def test_txt_has_a_prompt_per_line(self, tmp_path: Path):
        path = write_file(tmp_path / "prompts.txt", "\ufeffa cat\n\n  a \u2028dog \r\nan owl")
        assert load_prompts(3, path) == [Prompt("a cat"), Prompt("a \u2028dog"), Prompt("an owl")]

    def test_tsv_of_parti_prompts(self, tmp_path: Path):
        path = write_file(tmp_path / "PartiPrompts.tsv", PARTI)
        cells = [line.split("\t") for line in PARTI.splitlines()[1:]]
        texts = [cell[0].strip() for cell in cells]
        assert get_texts(load_prompts(5, path, "Prompt")) == texts
        prompts = load_prompts(5, path, "Prompt", "Category")
        groups = ["Illustrations", "Animals", "Abstract", "Animals", "Animals"]
        assert [prompt.group for prompt in prompts] == groups
        pairs = {(prompt.text, prompt.group) for prompt in prompts}
        assert pairs == set(zip(texts, [cell[1] for cell in cells], strict=True))

    def test_csv_of_the_csv_module(self, tmp_path: Path):
        rows = [("n", "caption"), (1, 'a sign: "stop", twice'), (2, "two\nlines"), (3, "a\ttab")]
        with open(tmp_path / "prompts.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        prompts = load_prompts(3, str(tmp_path / "prompts.csv"), "caption")
        assert get_texts(prompts) == [text for _, text in rows[1:]]

    def test_json_of_mjhq_takes_categories_in_turn(self, tmp_path: Path):
        content = {}
        for i in range(8):
            content[f"{i:040x}"] = {"category": "food" if i < 6 else "plants", "prompt": f"{i}"}
        path = write_file(tmp_path / "meta_data.json", content)
        assert load_prompts(4, path, group="category") == [
            Prompt("0", "food"),
            Prompt("6", "plants"),
            Prompt("1", "food"),
            Prompt("7", "plants"),
        ]
        expected = [Prompt(value["prompt"], value["category"]) for value in content.values()]
        assert Counter(load_prompts(8, path, group="category")) == Counter(expected)

    def test_a_larger_set_begins_with_the_same_prompts(self, tmp_path: Path):
        content = [{"prompt": str(i), "of": str(i % 3)} for i in range(20)]
        path = write_file(tmp_path / "a.json", content)
        everything = load_prompts(20, path, group="of")
        for count in range(20):
            assert load_prompts(count, path, group="of") == everything[:count]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "one\n\n", "holds 1 prompts, but 2 are needed"),
        (
            "a.csv",
            "text,n\na,1\nb,2\n",
            r"record 1 has no text in its field 'prompt'; its fields are 'text', 'n'",
        ),
        ("a.tsv", "prompt\tn\na\t1\n \t2\n", "record 2 has no text in its field 'prompt'"),
        ("a.csv", "prompt\na red, round cat\nb\n", "line 2: more cells than in the header"),
        ("a.json", '["a",\n "b"\n "c"]', r"line 3: this is not JSON: Expecting ',' delimiter"),
        ("a.json", [{"prompt": "a"}, {"prompt": 7}], "record 2 has no text in its field 'prompt'"),
        ("a.json", ["a", ""], "record 2 has no text"),
        (
            "a.json",
            {"prompts": ["a", "b"]},
            "must be a list of strings, a list of objects or an object of objects",
        ),
        ("a.json", ["a", {"prompt": "b"}], "must be a list of strings"),
        ("a.parquet", "", "ends in .txt, .json, .csv or .tsv"),
    ],
)
def test_a_mistake_in_a_file_gets_one_message(
    tmp_path: Path, name: str, content: object, message: str
):
    with pytest.raises(UserError, match=message):
        load_prompts(2, write_file(tmp_path / name, content))


def test_a_missing_short_or_binary_file_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"no file of prompts at nowhere\.txt"):
        load_prompts(1, "nowhere.txt")
    (tmp_path / "a.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(UserError, match="is not UTF-8: byte 5"):
        load_prompts(1, str(tmp_path / "a.txt"))
    path = write_file(tmp_path / "b.txt", "a\nb\nc")
    with pytest.raises(UserError, match="holds 1 prompts after the first 2, but 2 are needed"):
        load_prompts(2, path, start=2)


def number_prompts(style: str, count: int) -> list[Prompt]:
    return [Prompt(f"{style} {i}") for i in range(count)]


@pytest.mark.parametrize(
    ("count", "expected"), [(8, [2, 2, 2, 2]), (6, [2, 2, 1, 1]), (3, [1, 1, 1, 0])]
)
def test_combined_sets_are_drawn_from_evenly(count: int, expected: list[int]):
    sets = {style: partial(number_prompts, style) for style in HPS_STYLES}
    prompts = combine_sets(count, sets)
    groups = Counter(prompt.group for prompt in prompts)
    assert [groups[style] for style in HPS_STYLES] == expected
    assert all(prompt.text.startswith(f"{prompt.group} ") for prompt in prompts)
    assert prompts == combine_sets(8, sets)[:count]


def test_shared_texts_ignore_case_and_white_space():
    prompts = [Prompt("A  cat "), Prompt("a dog"), Prompt("a cat")]
    others = [Prompt("a\tCat"), Prompt("an owl")]
    assert find_shared_texts(prompts, others) == ["A  cat ", "a cat"]
    assert find_shared_texts(others, [Prompt("a dog")]) == []


def test_the_two_sides_of_the_shapes_world_are_disjoint():
    calibration = draw_captions(2000, ShapesWorld(), held_out=False)
    evaluation = draw_captions(2000, ShapesWorld(), held_out=True)
    assert find_shared_texts(calibration, evaluation) == []
