"""Memory that did not suffice: which option of the stage to change."""

import errno
import re
from collections.abc import Mapping
from typing import Any

from fp4dit.errors import UserError

# How much is computed at once.
LEARNING = ("rounding.fit.batch", "rounding.batch", "tuning.batch", "training.data.batch")
SIZES = (*LEARNING, "calibration.chunk", "generation.chunk")


def shortage(stage: str, config: Mapping[str, Any], error: Exception) -> UserError | None:
    """What to tell if the error is that memory was full, on the device or the host; None if it is another one."""
    # torch's, for which torch need not be imported; of a process that was spawned its traceback is what there is.
    device = type(error).__name__ == "OutOfMemoryError" or "torch.OutOfMemoryError: " in str(error)
    host = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not (device or host or "can't allocate memory" in str(error)):
        return None
    found = [f"{name} (now {value})" for name in SIZES if (value := chosen(config, name))]
    if not device:
        found.append("memory_budget_gb")
    less = f"Give a smaller {' or '.join(found)}" if found else "Close what else uses it"
    other = ", or trainer=cpu, which computes in the host's memory" if device else ""
    whose, details = "the device" if device else "the host", spawned(error).partition("\n")[0]
    return UserError(
        f"{stage}: the memory of {whose} is full. {less}{other}. What was finished is kept. {details}".rstrip()
    )


def spawned(error: Exception) -> str:
    """What an error says; of one in a spawned process, whose text is a traceback, the last line, without its class."""
    text = str(error).strip()
    return re.split(r"\n[\w.]+: ", text)[-1] if "Traceback (most recent call last)" in text else text


def chosen(config: Mapping[str, Any], name: str) -> Any:
    node: Any = config
    for field in name.split("."):
        node = node.get(field) if isinstance(node, Mapping) else None
    return node
