"""Removal of what no experiment and no table of conf needs from the store."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fp4dit.store.draft import draft_path, journal_path, lock_path, read_journal
from fp4dit.store.entries import StoreEntry, iter_leftovers, list_entries
from fp4dit.store.locks import describe_holder, is_locked, try_lock
from fp4dit.store.store import Store
from fp4dit.utils.formatting import align_columns, format_bytes
from pipelines.planning.plan_cache import RunPlan, plan_runs
from pipelines.results.describe import summarize_entries
from pipelines.results.rows import get_searchpath
from pipelines.results.select import (
    list_configured_runs,
    list_entry_names,
    list_stage_names,
    select_entries,
)


def collect_garbage(cfg: DictConfig, store: Store) -> None:
    """Print the entries that are not needed. Unless `dry_run`, remove those that no job holds."""
    entries = list_entries(store.root)
    if not entries:
        print(f"there is nothing in {store.root}")
        return
    runs = [overrides for group in list_configured_runs(cfg).values() for overrides in group]
    plans = plan_runs(runs, cfg.outputs, get_searchpath())
    garbage, num_spared = find_garbage(cfg, store, entries, plans)
    print_garbage(garbage, num_spared, [plan.problem for plan in plans if plan.problem])
    if cfg.dry_run:
        print("Nothing was removed: dry_run=false removes it")
        return
    num_removed = sum(map(remove_entry, garbage))
    num_leftovers = 0
    # In reverse order, the file that names a lock's holder is removed before the lock itself.
    for path, key in sorted(iter_leftovers(store.root), reverse=True):
        num_leftovers += remove_leftover(path, key)
    print(f"removed: {num_removed} entries, and {num_leftovers} files of ended jobs")


def find_garbage(
    cfg: DictConfig, store: Store, entries: Sequence[StoreEntry], plans: Sequence[RunPlan]
) -> tuple[list[StoreEntry], int]:
    """Return the entries to remove, and how many stay because a run cannot be planned.

    Args:
        cfg: The config of the command: `what` limits what is removed, and `keep` is not removed.
        store: The store.
        entries: Its entries.
        plans: The runs of all experiments and tables.
    """
    needed = list_entry_names(plans)
    if cfg.keep:
        needed |= {entry.name for entry in select_entries(cfg.keep, cfg, store)}
    # A run that cannot be planned may need any entry of its model, so all of them stay.
    models = {plan.model for plan in plans if plan.problem}
    spared = find_entries_of_models(entries, models) - needed
    stages = list_stage_names()  # entries of other stages may be of another version of the program
    keys_in_use = find_keys_in_use(entries)
    garbage = []
    for entry in select_entries(cfg.what, cfg, store):
        if entry.stage not in stages or entry.key in keys_in_use:
            continue
        if entry.name not in needed and entry.name not in spared:
            garbage.append(entry)
    return garbage, len(spared)


def find_keys_in_use(entries: Sequence[StoreEntry]) -> set[str]:
    """Return the keys of the entries that running jobs read as inputs."""
    keys: set[str] = set()
    for entry in entries:
        if entry.is_draft and is_locked(entry.lock_path):
            keys.update(read_journal(entry.path).get("needs", {}).values())
    return keys


def find_entries_of_models(entries: Sequence[StoreEntry], paths: Collection[str]) -> set[str]:
    """Return the names of the entries of some models, and of all that was made from them.

    Args:
        entries: All entries of the store.
        paths: The paths of the models.
    """
    manifests = {entry.name: entry.manifest for entry in entries}
    names = {name for name, manifest in manifests.items() if get_model_path(manifest) in paths}
    num_before = -1
    while len(names) > num_before:
        num_before = len(names)
        keys = {name.split("/")[1] for name in names}
        for name, manifest in manifests.items():
            if not keys.isdisjoint(manifest.get("needs", {}).values()):
                names.add(name)
    return names


def get_model_path(manifest: Mapping[str, Any]) -> str | None:
    """Return the path of the model that an entry was made with, if it was made with one."""
    return manifest.get("config", {}).get("model", {}).get("path")


def print_garbage(garbage: Sequence[StoreEntry], num_spared: int, problems: Sequence[str]) -> None:
    """Print the entries to remove, and why others stay.

    Args:
        garbage: The entries to remove.
        num_spared: How many stay because a run cannot be planned.
        problems: Why runs cannot be planned, once for each run.
    """
    for problem in dict.fromkeys(problems):
        print(f"{problems.count(problem)} rows cannot be planned: {problem}")
    if num_spared:
        print(f"{num_spared} entries stay, because they are of models of such rows")
    if garbage:
        print("No experiment and no table of conf needs")
        for line in align_columns(format_garbage(garbage)):
            print(f"  {line}")
    size = format_bytes(sum(entry.num_bytes for entry in garbage)) or "0 MB"
    print(f"{len(garbage)} entries to remove, of {size}")


def format_garbage(garbage: Sequence[StoreEntry]) -> list[tuple[str, ...]]:
    """Return the name, the size, and how it was made, of each entry to remove."""
    summaries = {}
    for stage in {entry.stage for entry in garbage}:
        summaries[stage] = summarize_entries([entry for entry in garbage if entry.stage == stage])
    lines = []
    for entry in garbage:
        summary = ("draft", "", "") if entry.is_draft else summaries[entry.stage][entry.key]
        lines.append((entry.name, format_bytes(entry.num_bytes), *summary))
    return lines


def remove_entry(entry: StoreEntry) -> bool:
    """Remove an entry unless a job holds it, and return whether it was removed."""
    with try_lock(entry.lock_path) as acquired:
        if not acquired:
            holder = describe_holder(entry.lock_path) or "a job"  # it may have ended just now
            print(f"{entry.name} stays: {holder} holds it")
            return False
        shutil.rmtree(entry.path)
        if entry.is_draft:
            journal_path(entry.path).unlink(missing_ok=True)
    return True


def remove_leftover(path: Path, key: str) -> bool:
    """Remove a file that a job left, unless it is still of use, and return whether it was removed.

    Args:
        path: The file.
        key: The key of its entry; empty for a cache that was never finished.
    """
    out = path.with_name(key or path.name)
    is_lock = path == lock_path(out)
    if key:
        in_use = draft_path(out).exists() or (is_lock and out.exists())
        if in_use or is_locked(lock_path(out)):
            return False
    with try_lock(path) if is_lock else nullcontext(True) as acquired:
        if acquired:
            path.unlink(missing_ok=True)
    return acquired
