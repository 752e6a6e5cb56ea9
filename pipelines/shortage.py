"""Memory that did not suffice: which option of the stage to change."""

import errno
from collections.abc import Mapping
from typing import Any

from fp4dit.errors import UserError

# How much is computed at once.
LEARNING = ("rounding.fit.batch", "rounding.batch", "tuning.batch", "training.data.batch")
SIZES = (*LEARNING, "calibration.chunk", "generation.chunk")


def shortage(stage: str, config: Mapping[str, Any], error: Exception) -> UserError | None:
    """What to tell if the error is that memory was full, on the device or the host; None if it is another one."""
    device = type(error).__name__ == "OutOfMemoryError"  # torch's, for which torch need not be imported
    host = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    if not (device or host or "can't allocate memory" in str(error)):
        return None
    found = [f"{name} (now {value})" for name in SIZES if (value := chosen(config, name))]
    if not device:
        found.append("memory_budget_gb")
    less = f"Give a smaller {' or '.join(found)}" if found else "Close what else uses it"
    other = ", or trainer=cpu, which computes in the host's memory" if device else ""
    whose, details = "the device" if device else "the host", str(error).partition("\n")[0]
    return UserError(
        f"{stage}: the memory of {whose} is full. {less}{other}. What was finished is kept. {details}".rstrip()
    )


def chosen(config: Mapping[str, Any], name: str) -> Any:
    node: Any = config
    for field in name.split("."):
        node = node.get(field) if isinstance(node, Mapping) else None
    return node
