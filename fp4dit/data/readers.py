"""Readers of files of prompts. Each record is a mapping from the name of a field to its value."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from fp4dit.utils.errors import UserError

Record = Mapping[str, Any]

COCO_LAYOUT = '{"images": [{"id"}], "annotations": [{"id", "image_id", "caption"}]}'


def read_records(path: str) -> Sequence[Record]:
    """Read the records of a file of prompts.

    Args:
        path: A .txt file with one record per line that is not blank; a .csv or .tsv file with one
            record per row; or a .json file with one record per string or object. A line or a
            string becomes the field `prompt`. A .tsv file has no quoting: a tab always ends a
            field, and a quotation mark is part of the text, as in the file of PartiPrompts.

    Raises:
        UserError: if the file cannot be read.
    """
    match Path(path).suffix.lower():
        case ".txt":
            return [{"prompt": line} for line in read_text_file(path).split("\n") if line.strip()]
        case ".json":
            return read_json_records(path)
        case ".csv":
            return read_table(path, csv.excel)
        case ".tsv":
            return read_table(path, UnquotedTSV)
    raise UserError(f"{path}: a file of prompts ends in .txt, .json, .csv or .tsv")


def read_coco_captions(path: str, per_image: bool = False) -> Sequence[Record]:
    """Read a file of captions in COCO's layout.

    Args:
        path: A file such as `captions_val2017.json`.
        per_image: Whether to read one caption of each image, in the order of the images: the one
            that was written first, which has the lowest id. Otherwise all captions are read, in
            file order.

    Returns:
        Records with the fields `caption`, `id` and `image`.

    Raises:
        UserError: if the file has another layout.
    """
    data = parse_json_file(path)
    annotations = []
    try:
        for entry in data["annotations"]:
            caption = entry["caption"].strip()
            annotations.append({"caption": caption, "id": entry["id"], "image": entry["image_id"]})
        images = [image["id"] for image in data["images"]]
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{path} is not a file of COCO's captions, which look like {COCO_LAYOUT}"
        ) from None
    if not per_image:
        return annotations
    first = {}
    for entry in sorted(annotations, key=itemgetter("id"), reverse=True):
        first[entry["image"]] = entry  # the last one that is set has the lowest id
    return [first[image] for image in images if image in first]


def read_json_records(path: str) -> Sequence[Record]:
    """Read a JSON list of strings, list of objects, or object of objects."""
    data = parse_json_file(path)
    if isinstance(data, dict) and all(isinstance(value, dict) for value in data.values()):
        return list(data.values())
    if isinstance(data, list) and all(isinstance(value, dict) for value in data):
        return data
    if isinstance(data, list) and all(isinstance(value, str) for value in data):
        return [{"prompt": value} for value in data]
    raise UserError(f"{path} must be a list of strings, a list of objects or an object of objects")


class UnquotedTSV(csv.excel_tab):
    """Dialect of tab-separated files in which quotation marks have no meaning."""

    quoting = csv.QUOTE_NONE


def read_table(path: str, dialect: type[csv.Dialect]) -> Sequence[Record]:
    """Read a table whose first row names the fields."""
    reader = csv.DictReader(io.StringIO(read_text_file(path), newline=""), dialect=dialect)
    rows = []
    try:
        for row in reader:
            if None in row:  # DictReader collects the cells without a field under None
                raise csv.Error(
                    "more cells than in the header; is a comma or a quotation mark of the text "
                    "not quoted?"
                )
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def parse_json_file(path: str) -> Any:
    """Parse a JSON file, and raise a UserError with the line of a syntax error."""
    try:
        return json.loads(read_text_file(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: this is not JSON: {error.msg}") from None


def read_text_file(path: str) -> str:
    """Read a UTF-8 file, and raise a UserError if it does not exist or is not UTF-8."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"there is no file of prompts at {path}")
    try:
        # Spreadsheets begin a file with a byte order mark, which utf-8-sig removes.
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is invalid") from None
