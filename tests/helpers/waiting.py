"""Waiting for events, however busy the machine is."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Seconds after which a wait for an event fails. No test may depend on their number: they only end a
# test that is broken, and have to suffice on a machine that is busy with other work.
PATIENCE = 900.0


def wait_until(condition: Callable[[], T], seconds: float = PATIENCE) -> T:
    """Wait until the condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not true after {seconds:.0f} s"
        time.sleep(0.02)
    return value
