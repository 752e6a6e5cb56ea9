"""Decide when a process saves the state of its work, so that it makes progress if it is killed."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

SHORTEST = 1.0  # seconds; an interval is not shorter, however quickly the process started
LONGEST = 60.0  # seconds; an interval is not longer, unless saving takes long
SAVES_PER_INTERVAL = 10.0  # an interval lasts at least as long as so many saves

_IMPORTED = time.monotonic()


def process_age() -> float:
    """Return the seconds since this process started.

    Where the system does not tell, they are counted from the import of this module.
    """
    try:
        # The name of the program, in parentheses, may contain spaces.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # since the machine was started
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - start)
    except (OSError, AttributeError, ValueError, IndexError):
        return time.monotonic() - _IMPORTED


class SaveTimer:
    """Says when the state of some work has to be saved, and saves it.

    The first save is due when the work has lasted as long as the process took to reach it, at least
    a second and at most `longest` seconds. A process that lives twice as long as it takes to start
    thus makes progress, however often it is killed. Later saves are due after the same time, or
    after ten times the duration of the last save if that is longer, so that saving never takes more
    than a tenth of the time.

    Args:
        longest: The longest time between two saves, in seconds. 0 saves at every opportunity.

    Example:
        >>> timer = SaveTimer()
        >>> for step in range(1000):
        ...     train(step)
        ...     if timer.is_due:
        ...         timer.save(lambda: write_checkpoint(path), path)
    """

    def __init__(self, longest: float = LONGEST) -> None:
        self.longest = longest
        self.base = self.interval = min(longest, max(SHORTEST, process_age()))
        self.start = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the state has to be saved now."""
        return time.monotonic() - self.start >= self.interval

    def save(self, write: Callable[[], None], path: Path) -> bool:
        """Save the state by calling `write`, and return whether that succeeded.

        A failure is logged, and the work continues, although the disk may be full. If the process
        is killed, it resumes from an earlier state.

        Args:
            write: Writes the state.
            path: The file or folder that is written, for the log.
        """
        begin = time.monotonic()
        try:
            write()
        except OSError as error:
            log.warning(
                "could not write %s, so a killed run resumes from an earlier point: %s", path, error
            )
            return False
        finally:
            self.start = time.monotonic()
            # With `longest` of 0 this is 0 as well.
            cost = SAVES_PER_INTERVAL * min(self.start - begin, self.longest)
            self.interval = max(self.base, cost)
        return True
