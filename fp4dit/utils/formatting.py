"""Format durations, sizes and columns for a terminal."""

from collections.abc import Sequence


def format_duration(seconds: int | float) -> str:
    """Format a duration in the largest unit of which there are at least two.

    >>> format_duration(7200)
    '2 h'
    """
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def format_bytes(count: int | float) -> str:
    """Format a number of bytes as MB or GB, and 0 as an empty text.

    >>> format_bytes(2.5e9)
    '2.5 GB'
    """
    if not count:
        return ""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Pad the cells of each column to the width of its widest cell, and join them to lines."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
