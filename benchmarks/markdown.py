"""Lines of tables."""

from collections.abc import Iterator


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*columns: str) -> Iterator[str]:
    """Numbers follow the first column."""
    yield row(*columns)
    yield "|---|" + "---:|" * (len(columns) - 1)
