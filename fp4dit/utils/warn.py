"""Warnings about what a user passed to a public function."""

import sys
import warnings

PACKAGES = ("fp4dit", "pipelines")


def warn_user(message: str) -> None:
    """Show a warning at the line of the user's code that called into this project.

    The public functions call each other, so no fixed `stacklevel` names that line.

    Example:
        >>> warn_user("5 prompts are few to calibrate on: 32 to 128 are sensible")
    """
    outermost, level, frame = 1, 1, sys._getframe()
    while frame := frame.f_back:
        level += 1
        if frame.f_globals.get("__name__", "").partition(".")[0] in PACKAGES:
            outermost = level
    warnings.warn(message, stacklevel=outermost + 1)
