"""The page of a report: one HTML file that needs no network and no other file."""

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from fp4dit.report import plots
from fp4dit.report.images import ReportImages, scores_by_image
from fp4dit.report.row_data import RowData
from fp4dit.tables.render import replace_infinities
from fp4dit.tables.rows import TableColumn
from fp4dit.tables.style import MARKDOWN, format_interval
from fp4dit.tables.table import Table
from fp4dit.utils.image_files import FRAME_MILLISECONDS

# The files that are joined into the page's script, in this order.
SCRIPTS = ("base.js", "table.js", "images.js", "plots.js", "main.js")


def read_asset(name: str) -> str:
    """Return the text of a file of fp4dit/report/assets."""
    return (files("fp4dit.report") / "assets" / name).read_text()


def render_page(
    name: str,
    table: Table,
    rows: Sequence[RowData],
    images: ReportImages,
    costs: Mapping[str, TableColumn],
    fill_command: str = "",
    origin: str = "",
) -> Iterator[str]:
    """Yield the page in pieces, because with images it may be too large to be in memory twice.

    Args:
        name: Name of the table.
        table: Table.
        rows: Data of the table's rows.
        images: Images of the rows.
        costs: Columns against which quality is plotted.
        fill_command: Command that makes all missing results; "" if none is missing.
        origin: When the results were made, and by which code.

    Raises:
        UserError: if the images exceed their limit.
    """
    from plotly.offline import get_plotlyjs  # here, because the core works without Plotly

    head = read_asset("page.html").replace("<!--style-->", read_asset("style.css"))
    head = head.replace("<!--title-->", html.escape(f"{name}: {table.heading}"))
    before, after = head.split("<!--data-->")
    yield before
    yield f'<script type="text/plain" id="plotly">{get_plotlyjs()}</script>\n'
    image_ids = {folder: f"images-{k}" for k, folder in enumerate(images.folders)}
    for folder, encoded in images.encode_folders():
        yield embed_json(image_ids[folder], encoded)
    for i, row in enumerate(rows):
        yield embed_json(f"layers-{i}", _layers_to_json(row))
    report = {
        "name": name,
        "heading": table.heading,
        "contradictions": list(table.contradictions),
        "footnotes": table.format_footnotes("Bold"),
        "origin": origin,
        "fill_command": describe_fill_command(table, fill_command),
        "encoding": images.describe_encoding(),
        "ratio": images.shown_size[0] / images.shown_size[1],
        "frames": images.num_frames,
        "frame_milliseconds": FRAME_MILLISECONDS,
        "columns": list_column_headers(table),
        "metrics": list_image_metrics(table, rows),
        "prompts": list_prompts(images, rows),
        "rows": [row_to_json(table, i, row, images, image_ids) for i, row in enumerate(rows)],
        "fronts": list(plots.make_front_plots(table, costs)),
        "sqnr": plots.find_sqnr_range(rows),
    }
    yield embed_json("report", report)
    yield after.replace("<!--script-->", "\n".join(map(read_asset, SCRIPTS)))


def _layers_to_json(row: RowData) -> dict[str, Any]:
    return {
        "sqnr": plots.make_sqnr_plot(row),
        "curves": plots.make_learning_curves(row),
        "histograms": row.histograms,
    }


def embed_json(name: str, value: Any) -> str:
    """Return JSON in a script element. No text can end the element, because `<` is escaped."""
    text = json.dumps(
        replace_infinities(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")
    ).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'


def describe_fill_command(table: Table, command: str) -> dict[str, str] | None:
    """Return the command that makes all missing results and a text before it, or None."""
    if not command:
        return None
    text = "This command makes everything that this page lacks:"
    num_present = sum(bool(row.values) for row in table.rows)
    if num_present < len(table.rows):
        text = f"{num_present} of {len(table.rows)} rows are in the store. {text}"
    return {"text": text, "command": command}


def list_column_headers(table: Table) -> list[dict[str, Any]]:
    """Return name, title and direction of each column. A paper's numbers are a column too."""
    headers = []
    for column in table.columns:
        header = {"name": column.name, "title": column.title, "better": column.better}
        headers.append({**header, "about": " ".join(table.column_definitions(column))})
        if table.is_published(column):
            headers.append(
                {
                    "name": f"{column.name}_published",
                    "title": f"{column.title}, published",
                    "better": column.better,
                }
            )
    return headers


def list_image_metrics(table: Table, rows: Sequence[RowData]) -> list[dict[str, Any]]:
    """Return the metrics with a value for each image.

    Metrics that compare with full precision are first, because they show what quantization changed.
    """
    columns = []
    for column in table.columns:
        if any(column.name in row.scored.per_image for row in rows):
            columns.append(column)
    metrics = []
    for column in sorted(columns, key=lambda column: not column.compares_to_reference):
        fields = ("name", "title", "digits", "factor", "better")
        metrics.append({field: getattr(column, field) for field in fields})
    return metrics


def list_prompts(images: ReportImages, rows: Sequence[RowData]) -> list[dict[str, Any]]:
    """Return text, seed and group of each prompt that is shown."""
    groups = {}
    for row in rows:
        for drawn in row.scored.images:
            groups[drawn["prompt"], drawn["seed"]] = drawn.get("group")
    prompts = []
    for text, seed in images.shown_keys:
        prompts.append({"text": text, "seed": seed, "group": groups.get((text, seed))})
    return prompts


def row_to_json(
    table: Table, i: int, data: RowData, images: ReportImages, image_ids: Mapping[Path, str]
) -> dict[str, Any]:
    """Return everything that the page shows of a row, without its layers and images."""
    row = table.rows[i]
    cells, scores = [], {}
    for column in table.columns:
        cells += cells_to_json(table, i, column)
        if column.name in data.scored.per_image:
            by_image = scores_by_image(data, column.name)
            scores[column.name] = [by_image.get(key) for key in images.shown_keys]
    return {
        "label": row.label,
        "group": row.group,
        "has_results": bool(row.values),
        "cells": cells,
        "command": data.command,
        "config": data.config,
        "stages": [{"name": s.name, "key": s.key, "state": s.state} for s in data.stages],
        "fill_command": data.fill_command,
        "problem": data.problem,
        "images": data.images and image_ids[data.images],
        "reference": data.reference and image_ids[data.reference],
        "scores": scores,
        "blocks": [{"unit": block["unit"], "error": block["error"]} for block in data.blocks],
    }


def cells_to_json(table: Table, i: int, column: TableColumn) -> Iterator[dict[str, Any]]:
    """Yield the cell of a number, with its text and the value to sort by.

    If a paper reports the column for some row, the cell of the paper's number follows.
    """
    row, value = table.rows[i], table.rows[i].values.get(column.name)
    plain = {"text": "–", "marks": "", "spread": "", "best": False}
    if value is None:
        yield {"value": value, **plain}
    else:
        yield {
            "value": value,
            "text": column.format_number(value),
            "marks": "".join(table.cell_signs(i, column)),
            "spread": format_interval(column, row).strip(),
            "best": table.cell_mark(i, column).best,
        }
    if table.is_published(column):
        published = row.published.values.get(column.metric) if row.published else None
        text = MARKDOWN.format_published(table, i, column)
        yield {"value": published, **plain, "text": text}
