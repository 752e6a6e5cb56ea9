"""The records of a file of texts, each a mapping from field to value, whatever kind of file it is."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from fp4dit.errors import UserError

Record = Mapping[str, Any]


def read(path: str) -> Sequence[Record]:
    """Of .txt each line that is not blank, of .csv and .tsv each row, of .json each string or object.

    What has no fields, a line or a string, has one called `prompt`. A .tsv knows no quotes: a tab always ends a field,
    and a quotation mark is a part of the text, as in the file of PartiPrompts.
    """
    match Path(path).suffix.lower():
        case ".txt":
            return [{"prompt": line} for line in text(path).split("\n") if line.strip()]
        case ".json":
            return of_json(path)
        case ".csv":
            return table(path, csv.excel)
        case ".tsv":
            return table(path, Unquoted)
    raise UserError(f"{path}: a file of prompts ends in .txt, .json, .csv or .tsv")


def coco(path: str, per_image: bool = False) -> Sequence[Record]:
    """The annotations of a file of captions in COCO's layout, in file order.

    With `per_image`, of each image the one that was written first (lowest id), in the order of the images.
    """
    data = parsed(path)
    try:
        annotations = [
            {"caption": a["caption"].strip(), "id": a["id"], "image": a["image_id"]} for a in data["annotations"]
        ]
        images = [image["id"] for image in data["images"]]
    except (AttributeError, KeyError, TypeError):
        layout = '{"images": [{"id"}], "annotations": [{"id", "image_id", "caption"}]}'
        raise UserError(f"{path} is no file of COCO's captions, which look like {layout}") from None
    if not per_image:
        return annotations
    first = {a["image"]: a for a in sorted(annotations, key=itemgetter("id"), reverse=True)}
    return [first[image] for image in images if image in first]


def of_json(path: str) -> Sequence[Record]:
    data = parsed(path)
    if isinstance(data, dict) and all(isinstance(value, dict) for value in data.values()):
        return list(data.values())
    if isinstance(data, list) and all(isinstance(value, dict) for value in data):
        return data
    if isinstance(data, list) and all(isinstance(value, str) for value in data):
        return [{"prompt": value} for value in data]
    raise UserError(f"{path} must be a list of strings, a list of objects or an object of objects")


class Unquoted(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def table(path: str, dialect: type[csv.Dialect]) -> Sequence[Record]:
    reader = csv.DictReader(io.StringIO(text(path), newline=""), dialect=dialect)
    rows = []
    try:
        for row in reader:
            if None in row:  # where DictReader puts what the header has no name for
                raise csv.Error("more cells than in the header; is a comma or a quotation mark of the text not quoted?")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def parsed(path: str) -> Any:
    try:
        return json.loads(text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: this is no JSON: {error.msg}") from None


def text(path: str) -> str:
    place = Path(path).expanduser()
    if not place.is_file():
        raise UserError(f"there is no file of prompts at {path}")
    try:
        return place.read_bytes().decode("utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is no part of it") from None
