"""Times and sizes as one says them, and lines of them."""

from collections.abc import Sequence


def duration(seconds: float) -> str:
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    """Bytes as MB or GB; nothing for none."""
    return "" if not count else f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns, each as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
