"""Short descriptions of entries of the store, and of drafts."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fp4dit.store.draft import draft_path, last_write_time, lock_path, read_journal, seconds_spent
from fp4dit.store.entries import StoreEntry
from fp4dit.store.locks import describe_holder
from fp4dit.store.store import Store
from fp4dit.utils.files import read_json
from fp4dit.utils.formatting import format_duration
from pipelines.config.validation import iter_leaves
from pipelines.planning.plan import PlannedStage

MAX_DIFFERENCES = 3  # fields of an entry's identity that are printed

COMMAND = "python -m pipelines.run "

# The day an entry was made, how long that took, and the command or the fields of the identity.
Summary = tuple[str, str, str]


def summarize_entries(entries: Sequence[StoreEntry]) -> dict[str, Summary]:
    """Return the day, the duration and the command of finished entries of one stage, by key.

    Where the command is unknown, the fields in which the entry differs from others stand instead.
    """
    manifests = {entry.key: entry.manifest for entry in entries if not entry.is_draft}
    fields = {}
    for key, manifest in manifests.items():
        fields[key] = dict(iter_leaves(manifest.get("config", {})))
    varying = find_varying_fields(list(fields.values()))
    summaries = {}
    for key, manifest in manifests.items():
        different = {name: value for name, value in fields[key].items() if name in varying}
        summaries[key] = summarize_manifest(manifest, different)
    return summaries


def find_varying_fields(entries: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the names of the fields that do not have the same value in all entries."""
    names = {name for fields in entries for name in fields}
    return {name for name in names if len({str(fields.get(name)) for fields in entries}) > 1}


def summarize_manifest(manifest: Mapping[str, Any], different: Mapping[str, Any]) -> Summary:
    """Return the day, the duration and the command of a finished entry.

    Args:
        manifest: The manifest of the entry; empty if it cannot be read.
        different: The fields of its identity that other entries have with other values.
    """
    if not manifest:
        return "damaged", "", "its manifest cannot be read"
    command = manifest.get("command", "").removeprefix(COMMAND)
    day = str(manifest.get("created", ""))[:10]
    return day, format_duration(manifest.get("seconds", 0)), command or format_fields(different)


def format_fields(fields: Mapping[str, Any]) -> str:
    """Format the first fields of an identity as overrides; those of higher levels come first."""
    names = sorted(fields, key=lambda name: (name.count("."), name))
    texts = [format_field(name, fields[name]) for name in names[:MAX_DIFFERENCES]]
    if len(names) > MAX_DIFFERENCES:
        texts.append(f"and {len(names) - MAX_DIFFERENCES} more")
    return " ".join(texts)


def format_field(name: str, value: Any) -> str:
    """Format a field as an override, and a class by its own name alone.

    >>> format_field("rounding._target_", "fp4dit.rounding.GPTQ")
    'rounding=GPTQ'
    """
    owner = name.removesuffix("._target_")
    return f"{name}={value}" if owner == name else f"{owner}={value.rpartition('.')[2]}"


def describe_draft(out: Path) -> str:
    """Describe the draft of an entry: when it was begun and last worked on, and who holds it.

    Args:
        out: The folder that the finished entry will have.
    """
    draft = draft_path(out)
    journal = read_journal(draft)
    state = "no job is working on it, and the next run continues it"
    if holder := describe_holder(lock_path(out)):
        state = f"{holder} is working on it"
    if "start" not in journal:
        return f"There is a draft; {state}."
    times = [
        f"begun at {format_time(journal.get('begun', journal['start']))}",
        f"last attempt at {format_time(journal['start'])}",
    ]
    if last_write := last_write_time(draft):
        times.append(f"last write at {format_time(last_write)}")
    times.append(f"{format_duration(seconds_spent(draft))} of work")
    return f"There is a draft, {', '.join(times)}; {state}."


def format_time(seconds: float) -> str:
    """Format a time in seconds since the epoch as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


class StageDescriber:
    """Says in words whether the results of planned stages are in a store.

    The manifests of a stage are read once, when a result is missing.

    Example:
        >>> StageDescriber(store).describe_state(stage, is_intact=False)
        'missing; version 1 is stored, and this is version 2'
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._configs: dict[str, list[tuple[Any, Mapping[str, Any]]]] = {}

    def describe_state(self, stage: PlannedStage, is_intact: bool) -> str:
        """Return in words whether the result of a stage is in the store.

        Args:
            stage: The stage.
            is_intact: Whether its result was found, with the files that are needed.
        """
        if is_intact:
            return "in the store"
        if self.store.get_path(stage.name, stage.key).exists():
            return "damaged"
        versions = sorted(self.find_other_versions(stage))
        if not versions:
            return "missing"
        version = stage.identity["version"]
        return f"missing; version {versions[-1]} is stored, and this is version {version}"

    def find_other_versions(self, stage: PlannedStage) -> set[int]:
        """Return the versions of the stored results that differ from a stage in nothing else."""
        if stage.name not in self._configs:
            self._configs[stage.name] = read_configs(self.store.root / stage.name)
        stored = self._configs[stage.name]
        versions = {version for version, config in stored if config == stage.config}
        return versions - {stage.identity.get("version"), None}


def read_configs(folder: Path) -> list[tuple[Any, Mapping[str, Any]]]:
    """Return the version and the config of each stored result of a stage.

    Args:
        folder: The folder of the stage.
    """
    configs = []
    for path in folder.glob("*/manifest.json"):
        try:
            config = read_json(path)["config"]
        except (OSError, ValueError, KeyError):
            continue
        version = config.pop("version", None)
        config.pop("content", None)
        configs.append((version, config))
    return configs
