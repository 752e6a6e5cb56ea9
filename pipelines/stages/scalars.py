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
    "call_error",
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
    # The error of calls with fine-tuned weights replaces that from before.
    for role in ("activations", "weights", "images", "transformer"):
        if role in needs and (needs[role] / "audit.json").exists():
            values |= read_audits(needs, role)
    scalars = {name: values[name] for name in STAGE_SCALARS if name in values}
    seconds = []
    for role in ("calls", "rounded", "weights", "calls_2", "weights_2"):
        if role in needs:
            seconds.append(read_json(needs[role] / "manifest.json")["seconds"])
    if seconds:
        scalars["calibration_seconds"] = sum(seconds)
    return scalars


def read_audits(needs: Needs, role: str) -> dict[str, Any]:
    """Read the audit of a role, joined with that of a second transformer, if there is one.

    Bits are means over the values of both transformers, bytes are sums, and everything else is a
    mean: as many steps are drawn by each, as far as is known. Layers of the second transformer have
    its name.
    """
    first = read_json(needs[role] / "audit.json")
    if f"{role}_2" not in needs:
        return first
    second = read_json(needs[f"{role}_2"] / "audit.json")
    joined = dict(first)
    for name, value in first.items():
        if name.startswith("bits_"):
            sizes = [sum(layer["values"] for layer in x["layers"]) or 1 for x in (first, second)]
            total = value * sizes[0] + second[name] * sizes[1]
            joined[name] = total / sum(sizes)
        elif name == "checkpoint_bytes":
            joined[name] = value + second[name]
        elif name != "layers":
            joined[name] = (value + second[name]) / 2
    others = [{**layer, "name": f"transformer_2.{layer['name']}"} for layer in second["layers"]]
    return joined | {"layers": [*first["layers"], *others]}
