"""Explain an out-of-memory error by the options of the stage that would lower its memory."""

import errno
import re
from collections.abc import Mapping
from typing import Any

from fp4dit.utils.errors import UserError

# Options for the number of samples that are computed at once, first those of learning stages.
LEARNING_OPTIONS = (
    "rounding.inner.batch_size",
    "rounding.batch_size",
    "finetune.batch_size",
    "training.data.batch",
)

SIZE_OPTIONS = (*LEARNING_OPTIONS, "calibration.batch_size", "generation.batch_size")


def explain_out_of_memory(
    stage: str, config: Mapping[str, Any], error: Exception
) -> UserError | None:
    """Return a UserError with a remedy if `error` means that memory is full, else None.

    Args:
        stage: The name of the stage that failed.
        config: The stage's config, in which the options to change are looked up.
        error: An error in this process or in one that Lightning spawned.
    """
    # The class is compared by name because torch may not be imported. The error of a spawned
    # process contains its traceback as text.
    name, text = type(error).__name__, str(error)
    device_full = name == "OutOfMemoryError" or "torch.OutOfMemoryError: " in text
    host_full = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not (device_full or host_full or "can't allocate memory" in text):
        return None
    options = []
    for option in SIZE_OPTIONS:
        if value := find_option(config, option):
            options.append(f"{option} (now {value})")
    if not device_full:
        options.append("memory_budget_gb")
    remedy = f"Give a smaller {' or '.join(options)}"
    if not options:
        remedy = "Close other programs that use it"
    cpu_advice = ", or trainer=cpu, which computes in the host's memory" if device_full else ""
    place = "the device" if device_full else "the host"
    details = last_error_line(error).partition("\n")[0]
    return UserError(
        f"{stage}: the memory of {place} is full. {remedy}{cpu_advice}. Finished parts are kept. "
        f"{details}".rstrip()
    )


def last_error_line(error: Exception) -> str:
    """Return the message of an error; if it is the traceback of a spawned process, its last line.

    The name of the error's class is left out.
    """
    text = str(error).strip()
    if "Traceback (most recent call last)" not in text:
        return text
    return re.split(r"\n[\w.]+: ", text)[-1]


def find_option(config: Mapping[str, Any], name: str) -> Any:
    """Return the value at a dotted name, or None if there is none."""
    node: Any = config
    for field in name.split("."):
        node = node.get(field) if isinstance(node, Mapping) else None
    return node
