"""A table to compute with: CSV and JSON, unrounded, in the units of metrics.json."""

import csv
import io
import json
import re
from dataclasses import asdict
from math import isfinite
from typing import Any

from fp4dit.comparisons import Mark
from fp4dit.tables import Table

MORE = r"_(sd|seed\d+|(best_)?diff(_low|_high)?|published|minus_published)"  # what is known of a column beside it


def as_csv(table: Table) -> str:
    """A missing value is an empty cell. The group stands behind the label,
    if the table has groups; what else is known of a column stands behind it."""
    grouped = any(table.groups)
    numbers = [table.numbers(i) for i in range(len(table.rows))]
    names = list(dict.fromkeys(name for found in numbers for name in found))
    keys: list[str] = []
    for column in table.columns:
        more = re.compile(re.escape(column.name) + MORE)
        keys += [*column.keys, *filter(more.fullmatch, names)]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *(["group"] if grouped else []), *keys])
    for i in (i for members in table.groups.values() for i in members):
        group = [table.rows[i].group or ""] if grouped else []
        cells = ("" if (v := numbers[i].get(key)) is None else v for key in keys)
        writer.writerow([table.rows[i].label, *group, *cells])
    return file.getvalue()


def as_json(table: Table) -> str:
    """Everything: numbers as in CSV, what each comparison gave, and what is written beside the table."""
    rows = []
    for i, own in enumerate(table.rows):
        marks = {name: asdict(mark) for name, mark in table.marks[i].items() if mark != Mark()}
        tested = [
            {"column": c.column.name, "with": c.rival, **asdict(c.difference), "p": c.p}
            for c in table.comparisons
            if c.row == i
        ]
        about = {"label": own.label, "group": own.group, "full_precision": own.reference}
        source = own.published and own.published.footnote
        rows.append({**about, "values": table.numbers(i), "marks": marks, "differences": tested, "published": source})
    text = {name: getattr(table, name) for name in ("heading", "question", "finding")}
    told = {what: {c.name: table.told(what, c) for c in table.columns} for what in ("about", "notes")}
    whole = {
        **text,
        "contradicts": list(table.contradicts),
        "columns": [asdict(column) for column in table.columns],
        "rows": rows,
        **{f"{what}_columns": {name: texts for name, texts in said.items() if texts} for what, said in told.items()},
        "footnotes": table.footnotes("best"),
    }
    return json.dumps(finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Without the infinities that JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value
