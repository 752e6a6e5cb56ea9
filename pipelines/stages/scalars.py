"""Numbers that the score stage copies from the stages before it. The module imports no torch."""

from typing import Any

from fp4dit.utils.files import read_json
from pipelines.stages.base import Needs

# Keys of audit.json that are copied.
STAGE_SCALARS = (
    "bits_weight",
    "bits_activation",
    "bit_operations",
    "checkpoint_bytes",
    "block_error",
    "steps",
    "loss",
    "step_seconds",
)


def collect_scalars(needs: Needs) -> dict[str, int | float]:
    """Collect bits, bytes, errors and losses, and the seconds of capture and reconstruction.

    Args:
        needs: The folders of the score stage's inputs, by role.
    """
    values: dict[str, Any] = {}
    for role in ("weights", "activations", "images", "transformer"):
        if role in needs and (needs[role] / "audit.json").exists():
            values |= read_json(needs[role] / "audit.json")
    scalars = {name: values[name] for name in STAGE_SCALARS if name in values}
    seconds = []
    for role in ("calls", "rounded", "weights"):
        if role in needs:
            seconds.append(read_json(needs[role] / "manifest.json")["seconds"])
    if seconds:
        scalars["calibration_seconds"] = sum(seconds)
    return scalars
