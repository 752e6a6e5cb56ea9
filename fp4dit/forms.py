"""A table to be read: in Markdown, on a terminal, in LaTeX."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fp4dit.rows import Column, Row
from fp4dit.tables import Table

WIDTH = 120  # characters of a line on a terminal, where it is text


@dataclass(frozen=True)
class Style:
    """How a form writes numbers: `bold` is the template of a group's best, and `named` what the legend calls it."""

    bold: str
    named: str
    marks: Callable[[Sequence[str]], str]
    spread: Callable[[Column, Row], str]
    number: str = "{}"
    missing: str = "–"

    def cell(self, table: Table, i: int, column: Column) -> str:
        own, value = table.rows[i], table.rows[i].values.get(column.name)
        if value is None:
            return self.missing
        template = self.bold if table.mark(i, column).best else "{}"
        number = template.format(column.number(value)) + self.marks(table.signs(i, column))
        return self.number.format(number + self.spread(column, own))

    def published(self, table: Table, i: int, column: Column) -> str:
        """A paper's number, how much larger ours is, and which footnote names the paper."""
        theirs, ours = table.rows[i].published, table.rows[i].values.get(column.name)
        if theirs is None or column.metric not in theirs.values:
            return ""
        value, source = theirs.values[column.metric], f"[{table.sources.index(theirs.footnote) + 1}]"
        if value is None:
            return f"n/a {source}"
        more = "" if ours is None else f" ({column.number(ours - value, '+')})"
        return f"{column.number(value)}{more} {source}"

    def titles(self, table: Table) -> list[str]:
        both = [[c.title, *(["published"] if table.is_published(c) else [])] for c in table.columns]
        return [title for titles in both for title in titles]

    def cells(self, table: Table, i: int) -> list[str]:
        found = []
        for column in table.columns:
            found.append(self.cell(table, i, column))
            if table.is_published(column):
                found.append(self.published(table, i, column))
        return found


def interval(column: Column, own: Row) -> str:
    """The spread over seeds, if there are several, and the interval."""
    low, high, sd = (own.values.get(f"{column.name}_{end}") for end in ("low", "high", "sd"))
    seeds = "" if sd is None else f" ± {column.number(sd)}"
    return seeds if low is None or high is None else f"{seeds} [{column.number(low)}, {column.number(high)}]"


def half_width(column: Column, own: Row) -> str:
    low, high = (own.values.get(f"{column.name}_{end}") for end in ("low", "high"))
    return "" if low is None or high is None else f" \\pm {column.number((high - low) / 2)}"


def superscript(signs: Sequence[str]) -> str:
    names = {"†": r"\dagger", "↓": r"\downarrow", "↑": r"\uparrow", "⚠": "!"}
    return f"^{{{' '.join(names[sign] for sign in signs)}}}" if signs else ""


MARKDOWN = Style("**{}**", "Bold", "".join, interval)
PLAIN = Style("{}•", "•", "".join, interval)
ANSI = Style("\x1b[1m{}\x1b[0m", "Bold", "".join, interval)
LATEX = Style(r"\mathbf{{{}}}", "Bold", superscript, half_width, "${}$", "--")


def blocks(table: Table, style: Style) -> Iterator[tuple[str | None, list[list[str]]]]:
    """Each group's name and its lines: a label and the cells."""
    for name, members in table.groups.items():
        yield name, [[table.rows[i].label, *style.cells(table, i)] for i in members]


def markdown(table: Table) -> str:
    titles = MARKDOWN.titles(table)
    lines = [["", *titles], ["---", *("---:" for _ in titles)]]
    for name, found in blocks(table, MARKDOWN):
        if name is not None:
            lines.append([f"**{name}**", *("" for _ in titles)])
        lines += found
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, width in enumerate(widths[1:], 1):
        lines[1][i] = "-" * (width - 1) + ":"
    lines[1][0] = "-" * max(3, widths[0])
    grid = "".join("| " + " | ".join(padded(line, widths)) + " |\n" for line in lines)
    heading = [f"### {table.heading}\n"] if table.heading else []
    against = "".join(f"- {sentence}\n" for sentence in table.against_papers)
    contradictions = ["Not as in the papers:\n", against] if against else []
    return "\n".join([*heading, grid, *contradictions, *(f"{note}\n" for note in table.footnotes(MARKDOWN.named))])


def terminal(table: Table, bold: bool = False) -> str:
    """Aligned, and bold where the terminal knows how; a group's rows stand under its name, a little to the right."""
    style = ANSI if bold else PLAIN
    lines = [["", *style.titles(table)]]
    for name, found in blocks(table, style):
        lines += [[name, *("" for _ in lines[0][1:])]] if name is not None else []
        lines += [[f"  {label}" if name is not None else label, *cells] for label, *cells in found]
    widths = [max(map(printed, column)) for column in zip(*lines, strict=True)]
    grid = "".join("  ".join(padded(line, widths)).rstrip() + "\n" for line in lines)
    papers = [f"Not as in the papers: {sentence}" for sentence in table.against_papers]
    texts = [textwrap.fill(text, WIDTH) + "\n" for text in [*papers, *table.footnotes(style.named)]]
    return "\n".join([*([textwrap.fill(table.heading, WIDTH) + "\n"] if table.heading else []), grid, *texts])


def printed(cell: str) -> int:
    """How wide it is on a terminal."""
    return len(cell.replace("\x1b[1m", "").replace("\x1b[0m", ""))


def padded(line: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Labels to the left, numbers to the right."""
    room = [" " * (width - printed(cell)) for cell, width in zip(line, widths, strict=True)]
    return [line[0] + room[0], *(space + cell for space, cell in zip(room[1:], line[1:], strict=True))]


def latex(table: Table) -> str:
    """A tabular for booktabs; means only, with half the width of the interval behind them.

    What is no number is a comment, for the caption to be written from.
    """
    titles = LATEX.titles(table)
    head = " & ".join(["", *map(escape, titles)])
    parts = []
    for name, found in blocks(table, LATEX):
        title = f"\\multicolumn{{{1 + len(titles)}}}{{l}}{{\\textit{{{escape(name)}}}}} \\\\\n" if name else ""
        parts.append(title + "".join(" & ".join([escape(line[0]), *line[1:]]) + r" \\" + "\n" for line in found))
    body, shape = "\\midrule\n".join(parts), "l" + "r" * len(titles)
    comment = lambda texts: "".join(f"% {' '.join(text.split())}\n" for text in texts if text)
    return (
        f"{comment([table.heading])}\\begin{{tabular}}{{{shape}}}\n\\toprule\n{head} \\\\\n\\midrule\n{body}"
        f"\\bottomrule\n\\end{{tabular}}\n{comment([*table.against_papers, *table.footnotes(LATEX.named)])}"
    )


def escape(text: str) -> str:
    return "".join(f"\\{c}" if c in "&%$#_{}" else c for c in text)
