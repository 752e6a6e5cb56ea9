"""Tables of results: their rows, intervals, significance, published numbers, and renderers.

`papers/` holds the numbers that papers report. The package imports only `fp4dit.utils`.
"""

from fp4dit.tables.rows import ScoredRow, TableColumn
from fp4dit.tables.table import Table

__all__ = [
    "ScoredRow",
    "Table",
    "TableColumn",
]
