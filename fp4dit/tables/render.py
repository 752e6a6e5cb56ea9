"""Render a table: Markdown, terminal and LaTeX for readers, CSV and JSON for programs."""

import csv
import io
import json
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from fp4dit.tables.significance import Mark
from fp4dit.tables.style import ANSI, LATEX, MARKDOWN, PLAIN, TableStyle
from fp4dit.tables.table import Table

TERMINAL_WIDTH = 120  # characters of a line of text

# Suffixes of a column's name that name further numbers of the column.
SUFFIXES = r"_(sd|seed\d+|(best_)?diff(_low|_high)?|published|minus_published)"


def iterate_groups(table: Table, style: TableStyle) -> Iterator[tuple[str | None, list[list[str]]]]:
    """Yield the name of each group and its lines: a label and the cells."""
    for name, members in table.groups.items():
        yield name, [[table.rows[i].label, *style.row_cells(table, i)] for i in members]


def render_markdown(table: Table) -> str:
    """Return the table in Markdown, with its heading and footnotes."""
    titles = MARKDOWN.column_titles(table)
    lines = [["", *titles], ["---", *(["---:"] * len(titles))]]
    for name, group_lines in iterate_groups(table, MARKDOWN):
        if name is not None:
            lines.append([f"**{name}**", *([""] * len(titles))])
        lines += group_lines
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, width in enumerate(widths[1:], 1):
        lines[1][i] = "-" * (width - 1) + ":"
    lines[1][0] = "-" * max(3, widths[0])
    grid = ""
    for line in lines:
        grid += "| " + " | ".join(pad_cells(line, widths)) + " |\n"
    parts = [f"### {table.heading}\n"] if table.heading else []
    parts.append(grid)
    if table.contradictions:
        sentences = "".join(f"- {sentence}\n" for sentence in table.contradictions)
        parts += ["Not as in the papers:\n", sentences]
    parts += [f"{note}\n" for note in table.format_footnotes(MARKDOWN.bold_name)]
    return "\n".join(parts)


def render_terminal(table: Table, bold: bool = False, brief: bool = False) -> str:
    """Return the table aligned for a terminal.

    The rows of a group are indented below its name.

    Args:
        table: The table.
        bold: Print the best numbers in bold by ANSI codes, instead of marking them with a dot.
        brief: Print no footnotes but the legend of the marks.
    """
    style = ANSI if bold else PLAIN
    titles = style.column_titles(table)
    lines = [["", *titles]]
    for name, group_lines in iterate_groups(table, style):
        if name is not None:
            lines.append([name, *([""] * len(titles))])
        indent = "" if name is None else "  "
        lines += [[indent + label, *cells] for label, *cells in group_lines]
    widths = [max(map(measure_width, column)) for column in zip(*lines, strict=True)]
    grid = "".join("  ".join(pad_cells(line, widths)).rstrip() + "\n" for line in lines)
    texts = [f"Not as in the papers: {sentence}" for sentence in table.contradictions]
    if brief:
        texts += filter(None, [table.format_legend(style.bold_name)])
    else:
        texts += table.format_footnotes(style.bold_name)
    paragraphs = [textwrap.fill(text, TERMINAL_WIDTH) + "\n" for text in texts]
    heading = [textwrap.fill(table.heading, TERMINAL_WIDTH) + "\n"] if table.heading else []
    return "\n".join([*heading, grid, *paragraphs])


def measure_width(cell: str) -> int:
    """Return the number of characters that a cell takes on a terminal."""
    return len(cell.replace("\x1b[1m", "").replace("\x1b[0m", ""))


def pad_cells(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Pad the label to the right and the numbers to the left."""
    label, *numbers = line
    padded = [label + " " * (widths[0] - measure_width(label))]
    for cell, width in zip(numbers, widths[1:], strict=True):
        padded.append(" " * (width - measure_width(cell)) + cell)
    return padded


def render_latex(table: Table) -> str:
    """Return a tabular for booktabs, with half the width of the interval behind each mean.

    The heading and the footnotes are LaTeX comments, from which a caption can be written.
    """
    titles = LATEX.column_titles(table)
    head = " & ".join(["", *map(escape_latex, titles)])
    parts = []
    for name, group_lines in iterate_groups(table, LATEX):
        part = ""
        if name:
            group_title = f"\\textit{{{escape_latex(name)}}}"
            part = f"\\multicolumn{{{1 + len(titles)}}}{{l}}{{{group_title}}} \\\\\n"
        for label, *cells in group_lines:
            part += " & ".join([escape_latex(label), *cells]) + " \\\\\n"
        parts.append(part)
    body, columns = "\\midrule\n".join(parts), "l" + "r" * len(titles)
    footnotes = [*table.contradictions, *table.format_footnotes(LATEX.bold_name)]
    return (
        f"{_comment_latex([table.heading])}"
        f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        f"\\bottomrule\n\\end{{tabular}}\n{_comment_latex(footnotes)}"
    )


def _comment_latex(texts: Sequence[str]) -> str:
    return "".join(f"% {' '.join(text.split())}\n" for text in texts if text)


def escape_latex(text: str) -> str:
    """Escape the characters that mean something to LaTeX."""
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)


def render_csv(table: Table) -> str:
    """Return the table as CSV.

    A missing value is an empty cell. If the table has groups, the group is the second column. The
    columns after a column hold its further numbers, such as differences.
    """
    has_groups = any(table.groups)
    numbers = [table.row_numbers(i) for i in range(len(table.rows))]
    keys = _list_csv_keys(table, numbers)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["label", *(["group"] if has_groups else []), *keys])
    for members in table.groups.values():
        for i in members:
            cells = [table.rows[i].label]
            if has_groups:
                cells.append(table.rows[i].group or "")
            for key in keys:
                value = numbers[i].get(key)
                cells.append("" if value is None else value)
            writer.writerow(cells)
    return file.getvalue()


def _list_csv_keys(table: Table, numbers: Sequence[Mapping[str, Any]]) -> list[str]:
    names: dict[str, None] = {}
    for row_numbers in numbers:
        names.update(dict.fromkeys(row_numbers))
    keys: list[str] = []
    for column in table.columns:
        suffixed_name = re.compile(re.escape(column.name) + SUFFIXES)
        keys += [*column.csv_keys, *filter(suffixed_name.fullmatch, names)]
    return keys


def render_json(table: Table) -> str:
    """Return everything as JSON: numbers as in CSV, comparisons, and all texts."""
    notes, definitions = {}, {}
    for column in table.columns:
        if texts := table.column_notes(column):
            notes[column.name] = texts
        if texts := table.column_definitions(column):
            definitions[column.name] = texts
    content = {
        "heading": table.heading,
        "question": table.question,
        "finding": table.finding,
        "contradicts": list(table.contradicts),
        "columns": [asdict(column) for column in table.columns],
        "rows": [_row_to_dict(table, i) for i in range(len(table.rows))],
        "about_columns": definitions,
        "notes_columns": notes,
        "footnotes": table.format_footnotes("best"),
    }
    text = json.dumps(replace_infinities(content), indent=1, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def _row_to_dict(table: Table, i: int) -> dict[str, Any]:
    row = table.rows[i]
    differences = []
    for comparison in table.comparisons:
        if comparison.row == i:
            compared = {"column": comparison.column.name, "with": comparison.rival}
            interval = asdict(comparison.difference)
            differences.append({**compared, **interval, "p": comparison.p})
    return {
        "label": row.label,
        "group": row.group,
        "full_precision": row.reference,
        "values": table.row_numbers(i),
        "marks": {name: asdict(mark) for name, mark in table.marks[i].items() if mark != Mark()},
        "differences": differences,
        "published": row.published and row.published.source,
    }


def replace_infinities(value: Any) -> Any:
    """Replace infinite and undefined numbers by None, because JSON has none."""
    if isinstance(value, dict):
        return {key: replace_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_infinities(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
