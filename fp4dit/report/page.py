"""The page itself: everything in one file, which asks nothing of anybody."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from fp4dit.exports import finite
from fp4dit.forms import MARKDOWN, interval
from fp4dit.report import plots
from fp4dit.report.album import Album, scores
from fp4dit.report.material import Material
from fp4dit.rows import Column
from fp4dit.tables import Table

SCRIPTS = ("base.js", "table.js", "images.js", "plots.js", "begin.js")  # as one script, in this order


def asset(name: str) -> str:
    return (files("fp4dit.report") / "assets" / name).read_text()


def page(
    name: str,
    table: Table,
    materials: Sequence[Material],
    album: Album,
    costs: Mapping[str, Column],
    fill: str = "",
    made: str = "",
) -> Iterator[str]:
    """The pieces of the page, in order: with images it may be too large to be held twice.

    `materials` are those of the table's rows. `fill` is the command that makes all that is missing.

    Raises:
        UserError: if the images are more than the album's limit.
    """
    head = (
        asset("page.html")
        .replace("<!--title-->", html.escape(f"{name}: {table.heading}"))
        .replace("<!--style-->", asset("style.css"))
    )
    before, after = head.split("<!--data-->")
    yield before
    yield f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>\n'
    blocks = {path: f"images-{k}" for k, path in enumerate(album.folders)}
    for path, images in album.blocks():
        yield embedded(blocks[path], images)
    for i, material in enumerate(materials):
        own = {"sqnr": plots.sqnr(material), "curves": plots.curves(material), "histograms": material.histograms}
        yield embedded(f"layers-{i}", own)
    yield embedded(
        "report",
        {
            "name": name,
            "heading": table.heading,
            "against": list(table.against_papers),
            "footnotes": table.footnotes("Bold"),
            "made": made,
            "fill": fill and {"text": missing(table), "command": fill},
            "encoding": album.encoding(),
            "ratio": album.ratio,
            "columns": titles(table),
            "metrics": metrics(table, materials),
            "prompts": prompts(album, materials),
            "rows": [shown(table, i, material, album, blocks) for i, material in enumerate(materials)],
            "fronts": list(plots.fronts(table, costs)),
            "sqnr": plots.span(materials),
        },
    )
    yield after.replace("<!--script-->", "\n".join(map(asset, SCRIPTS)))


def embedded(name: str, value: Any) -> str:
    """JSON in a script element that no text can end: `<` is written as an escape."""
    text = json.dumps(finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def missing(table: Table) -> str:
    there = sum(bool(row.values) for row in table.rows)
    scored = f"{there} of {len(table.rows)} rows are in the store. " if there < len(table.rows) else ""
    return f"{scored}To make all that this page lacks:"


def titles(table: Table) -> list[dict[str, Any]]:
    found = []
    for column in table.columns:
        told = " ".join(table.told("about", column))
        found.append({"name": column.name, "title": column.title, "better": column.better, "about": told})
        if table.is_published(column):
            found.append(
                {"name": f"{column.name}_published", "title": f"{column.title}, published", "better": column.better}
            )
    return found


def metrics(table: Table, materials: Sequence[Material]) -> list[dict[str, Any]]:
    """Of each image; those come first that compare it with full precision, for they say where to look."""
    known = [c for c in table.columns if any(c.name in m.scored.per_image for m in materials)]
    return [
        {"name": c.name, "title": c.title, "digits": c.digits, "factor": c.factor, "better": c.better}
        for c in sorted(known, key=lambda c: not c.compares)
    ]


def prompts(album: Album, materials: Sequence[Material]) -> list[dict[str, Any]]:
    groups = {(d["prompt"], d["seed"]): d.get("group") for m in materials for d in m.scored.images}
    return [{"text": text, "seed": seed, "group": groups.get((text, seed))} for text, seed in album.shots]


def shown(table: Table, i: int, material: Material, album: Album, blocks: Mapping[Path, str]) -> dict[str, Any]:
    row = table.rows[i]
    known = {c.name: scores(material, c.name) for c in table.columns if c.name in material.scored.per_image}
    return {
        "label": row.label,
        "group": row.group,
        "there": bool(row.values),
        "cells": [cell for column in table.columns for cell in cells(table, i, column)],
        "command": material.command,
        "config": material.config,
        "stages": [{"name": s.name, "key": s.key, "state": s.state} for s in material.stages],
        "fill": material.fill,
        "problem": material.problem,
        "images": material.images and blocks[material.images],
        "reference": material.reference and blocks[material.reference],
        "scores": {name: [found.get(shot) for shot in album.shots] for name, found in known.items()},
        "blocks": [{"unit": block["unit"], "error": block["error"]} for block in material.blocks],
    }


def cells(table: Table, i: int, column: Column) -> Iterator[dict[str, Any]]:
    """A number as it is read and as it is sorted, and beside it what is published."""
    row, value = table.rows[i], table.rows[i].values.get(column.name)
    known = {"text": "–", "marks": "", "spread": "", "best": False}
    if value is not None:
        signs, best = "".join(table.signs(i, column)), table.mark(i, column).best
        known = {"text": column.number(value), "marks": signs, "spread": interval(column, row).strip(), "best": best}
    yield {"value": value, **known}
    if table.is_published(column):
        theirs = row.published.values.get(column.metric) if row.published else None
        yield {"value": theirs, "text": MARKDOWN.published(table, i, column), "marks": "", "spread": "", "best": False}
