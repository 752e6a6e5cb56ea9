"""How an entry of the store was made, in few words."""

from collections.abc import Mapping, Sequence
from typing import Any

from fp4dit.stored import Stored
from pipelines.kinds import leaves
from pipelines.units import duration

SHOWN = 3  # values in which an entry differs from others of its stage
COMMAND = "python -m pipelines.run "


def told(entries: Sequence[Stored]) -> dict[str, tuple[str, str, str]]:
    """Of each key of one stage: the day, how long it took, and the command that made it first. Where that is not known,
    in what it differs from others that are there."""
    manifests = {one.key: one.manifest for one in entries if not one.is_draft}
    values = {key: dict(leaves(manifest.get("config", {}))) for key, manifest in manifests.items()}
    own = {key: {name: value for name, value in its.items() if varies(name, values)} for key, its in values.items()}
    return {key: line(manifest, own[key]) for key, manifest in manifests.items()}


def line(manifest: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[str, str, str]:
    if not manifest:
        return "damaged", "", "its manifest cannot be read"
    how = manifest.get("command", "").removeprefix(COMMAND) or differing(own)
    return str(manifest.get("created", ""))[:10], duration(manifest.get("seconds", 0)), how


def differing(own: Mapping[str, Any]) -> str:
    names = sorted(own, key=lambda name: (name.count("."), name))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return " ".join(short(name, own[name]) for name in names[:SHOWN]) + more


def short(name: str, value: Any) -> str:
    """Of a class its own name alone."""
    whose = name.removesuffix("._target_")
    return f"{name}={value}" if whose == name else f"{whose}={value.rpartition('.')[2]}"


def varies(name: str, values: Mapping[str, Mapping[str, Any]]) -> bool:
    return len({str(its.get(name)) for its in values.values()}) > 1
