"""The styles of rendered tables: how numbers, marks and intervals are printed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fp4dit.tables.rows import ScoredRow, TableColumn
from fp4dit.tables.table import Table


@dataclass(frozen=True)
class TableStyle:
    """Rules by which a renderer prints numbers.

    Attributes:
        bold: Template of the best number of a group.
        bold_name: Name of this style in the legend.
        format_signs: Returns the text of the signs behind a number.
        format_spread: Returns the text of the interval behind a number.
        number_template: Template of a number with all that belongs to it.
        missing: Printed in place of a missing number.

    Example:
        >>> MARKDOWN.format_cell(table, 0, table.columns[0])
        '**36.0** [35.4, 36.6]'
    """

    bold: str
    bold_name: str
    format_signs: Callable[[Sequence[str]], str]
    format_spread: Callable[[TableColumn, ScoredRow], str]
    number_template: str = "{}"
    missing: str = "–"

    def format_cell(self, table: Table, i: int, column: TableColumn) -> str:
        """Return a number with its marks and its interval."""
        value = table.rows[i].values.get(column.name)
        if value is None:
            return self.missing
        template = self.bold if table.cell_mark(i, column).best else "{}"
        number = template.format(column.format_number(value))
        signs = self.format_signs(table.cell_signs(i, column))
        spread = self.format_spread(column, table.rows[i])
        return self.number_template.format(number + signs + spread)

    def format_published(self, table: Table, i: int, column: TableColumn) -> str:
        """Return a paper's number, ours minus the paper's, and the footnote of the paper."""
        published, ours = table.rows[i].published, table.rows[i].values.get(column.name)
        if published is None or column.metric not in published.values:
            return ""
        theirs = published.values[column.metric]
        difference = "" if ours is None else f" ({column.format_number(ours - theirs, '+')})"
        footnote = table.sources.index(published.source) + 1
        return f"{column.format_number(theirs)}{difference} [{footnote}]"

    def column_titles(self, table: Table) -> list[str]:
        """Return the headings, with one for a paper's numbers where there are any."""
        titles = []
        for column in table.columns:
            titles.append(column.title)
            if table.is_published(column):
                titles.append("published")
        return titles

    def row_cells(self, table: Table, i: int) -> list[str]:
        """Return the cells of a row, without its label."""
        cells = []
        for column in table.columns:
            cells.append(self.format_cell(table, i, column))
            if table.is_published(column):
                cells.append(self.format_published(table, i, column))
        return cells


def format_interval(column: TableColumn, row: ScoredRow) -> str:
    """Return the spread over seeds, if there are several, and the interval."""
    low, high = row.values.get(f"{column.name}_low"), row.values.get(f"{column.name}_high")
    deviation = row.values.get(f"{column.name}_sd")
    spread = "" if deviation is None else f" ± {column.format_number(deviation)}"
    if low is None or high is None:
        return spread
    return f"{spread} [{column.format_number(low)}, {column.format_number(high)}]"


def format_half_width(column: TableColumn, row: ScoredRow) -> str:
    """Return half the width of the interval, in LaTeX."""
    low, high = row.values.get(f"{column.name}_low"), row.values.get(f"{column.name}_high")
    if low is None or high is None:
        return ""
    return f" \\pm {column.format_number((high - low) / 2)}"


def format_superscript(signs: Sequence[str]) -> str:
    """Return signs as a superscript in LaTeX."""
    names = {"†": r"\dagger", "↓": r"\downarrow", "↑": r"\uparrow", "⚠": "!"}
    return f"^{{{' '.join(names[sign] for sign in signs)}}}" if signs else ""


MARKDOWN = TableStyle("**{}**", "Bold", "".join, format_interval)

PLAIN = TableStyle("{}•", "•", "".join, format_interval)

ANSI = TableStyle("\x1b[1m{}\x1b[0m", "Bold", "".join, format_interval)

LATEX = TableStyle(r"\mathbf{{{}}}", "Bold", format_superscript, format_half_width, "${}$", "--")
