"""Times in progress displays. The module imports neither torch nor Lightning."""

from dataclasses import dataclass

SECONDS_BETWEEN_LINES = 10.0


@dataclass
class LastPrinted:
    """The time of the last line of progress, shared by the many short fits of one job."""

    time: float = 0.0


def format_clock(seconds: float) -> str:
    """Format a duration as minutes and seconds, with hours if there are any.

    >>> format_clock(3723)
    '1:02:03'
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
