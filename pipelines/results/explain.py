"""Explain why a run has no result: what differs from the nearest entry in the store.

A result is found by its key, the hash of the identity of its stage. A run without a result
therefore has a stage whose identity no stored entry has. The stored entry with the fewest
different fields shows which option, file or version has changed.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from fp4dit.store.draft import draft_path
from fp4dit.store.entries import list_entries
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import suggest_names
from pipelines.planning.executor import list_pending_stages
from pipelines.planning.plan import PlannedStage
from pipelines.planning.plan_cache import RunPlan, plan_runs
from pipelines.results.describe import describe_draft
from pipelines.results.differences import ABSENT, Difference, format_value, iter_differences
from pipelines.results.rows import get_searchpath
from pipelines.results.select import (
    MIN_KEY_DIGITS,
    ConfiguredRow,
    Overrides,
    group_runs,
    list_experiments,
    list_rows,
    matches_key,
)

RESULT = "score"  # the stage that makes the numbers of a run

# Explanations of the fields of an identity that are not options, by the first part of their name.
FIELD_NOTES = {
    "content": " (hash of the files that the stage reads)",
    "version": " (version of the stage's code)",
}

# A word that may be a key or the beginning of one, with or without `stage/` before it.
KEY_WORD = re.compile(rf"(\w+/)?[0-9a-f]{{{MIN_KEY_DIGITS},16}}")


def explain_results(cfg: DictConfig, store: Store) -> None:
    """Print for each word of the command why it has no result, or where its result is.

    Raises:
        UserError: if there is no word, or one is no row, experiment, table or key.
    """
    if not cfg.what:
        raise UserError(
            "explain needs a row, an experiment, a table or a key: "
            "python -m pipelines.store explain demo_4_fp4dit_w4a8"
        )
    explainer = ResultExplainer(store)
    if not explainer.entries:
        print(f"The store in {store.root} has no results yet.")
        return
    experiments, rows = list_experiments(cfg), list_rows(cfg)
    configured = group_runs(experiments, rows)
    for word in cfg.what:
        if runs := find_runs(word, experiments, rows):
            plans = plan_runs(list(runs.values()), cfg.outputs, get_searchpath())
            for name, plan in zip(runs, plans, strict=True):
                print(*explainer.explain_run(name, plan), sep="\n")
        else:
            print(*explain_key(word, configured, rows, cfg.outputs, explainer), sep="\n")


def find_runs(
    word: str, experiments: Mapping[str, Overrides], rows: Sequence[ConfiguredRow]
) -> dict[str, Overrides]:
    """Return the runs of an experiment, of a table, or of the rows with a label, by their names."""
    if word in experiments:
        return {word: experiments[word]}
    runs: dict[str, Overrides] = {}
    for row in rows:
        if word == row.table or row.matches(word):
            runs |= row.runs
    return runs


def explain_key(
    word: str,
    configured: Mapping[str, Sequence[Overrides]],
    rows: Sequence[ConfiguredRow],
    outputs: str,
    explainer: "ResultExplainer",
) -> list[str]:
    """Explain the entry or the planned stage that a key, or its beginning, belongs to.

    Args:
        word: The key.
        configured: The runs of each experiment and of each table, by its name.
        rows: The rows of all tables, whose names may be meant by a wrong word.
        outputs: The folder of all results.
        explainer: The explainer of the store.

    Raises:
        UserError: if nothing in the store and no configured run has such a key.
    """
    stored = []
    for entry in explainer.entries:
        if not entry.is_draft and matches_key(word, entry.stage, entry.key):
            stored.append(explainer.describe_stored(entry.stage, entry.key))
    if stored:
        return stored
    if KEY_WORD.fullmatch(word):
        runs = [overrides for group in configured.values() for overrides in group]
        for plan in plan_runs(runs, outputs, get_searchpath()):
            for stage in plan.stages.values():
                if matches_key(word, stage.name, stage.key):
                    return list(explainer.explain_run(stage.entry_name, plan, stage.name))
    for entry in explainer.entries:
        if matches_key(word, entry.stage, entry.key):
            history = describe_draft(entry.path.with_name(entry.key))
            return [
                f"{entry.name} is not finished. {history}",
                "No experiment and no table has this key: give the overrides that it was made "
                "with, as in 'overrides=[\"rounding.steps=400\"]'.",
            ]
    known = list(configured)
    for row in rows:
        known += [row.label, f"{row.table}/{row.name}"]
    known += [entry.name for entry in explainer.entries]
    raise UserError(f"{word!r} is no row, experiment, table or key; {suggest_names(word, known)}")


class ResultExplainer:
    """Compares planned stages with the entries of a store.

    A stage that several runs share is explained once.

    Example:
        >>> explainer = ResultExplainer(Store(Path("outputs/store")))
        >>> print(*explainer.explain_run("demo_4", plan), sep="\\n")
        demo_4 has no result. Stages without one: reconstruct, activate, generate, score
        reconstruct/0123456789abcdef is not in the store.
          The only entry of this stage in the store is reconstruct/fedcba9876543210. It differs in:
            rounding.steps: 200 -> 400
        ...
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.entries = list_entries(store.root)
        self.manifests: dict[str, dict[str, Mapping[str, Any]]] = {}
        self._differences: dict[tuple[str, str], list[Difference]] = {}
        self._explained: set[str] = set()
        for entry in self.entries:
            if "config" in (manifest := entry.manifest):
                self.manifests.setdefault(entry.stage, {})[entry.key] = manifest

    def explain_run(self, name: str, plan: RunPlan, target: str = RESULT) -> Iterator[str]:
        """Yield lines that say why a run has no result, or where its result is.

        Args:
            name: The name to print for the run.
            plan: The planned stages of the run.
            target: The stage whose result is meant.
        """
        if plan.problem:
            yield f"{name} cannot be planned: {plan.problem}"
            return
        stages = plan.stages
        if self.store.find_entry(target, stages[target].key):
            yield f"{name} has a result. {self.describe_stored(target, stages[target].key)}"
            return
        pending = list_pending_stages(stages, [target], self.store)
        names = ", ".join(stage.name for stage in pending)
        yield f"{name} has no result. Stages without one: {names}"
        for stage, key in self.choose_references(stages, pending):
            if stage.entry_name not in self._explained:
                self._explained.add(stage.entry_name)
                yield from self.explain_stage(stage, key, stages)
            elif stage in pending:
                yield f"{stage.entry_name} has no result, as explained above."

    def choose_references(
        self, stages: Mapping[str, PlannedStage], pending: Sequence[PlannedStage]
    ) -> list[tuple[PlannedStage, str | None]]:
        """Return the stages to explain, in order, each with the key of the entry to compare with.

        These are the stages without a result, compared with the nearest entry, and those with a
        result from which the nearest entry of a later stage was not made.
        """
        keys: dict[str, str | None] = {}
        for stage in reversed(list(stages.values())):
            if stage in pending:
                keys[stage.name] = self.find_nearest(stage, stages)
            key = keys.get(stage.name)
            if key is None:
                continue
            for role, name in stage.needs.items():
                stored_key = self.manifests[stage.name][key].get("needs", {}).get(role)
                if stored_key != stages[name].key and stored_key in self.manifests.get(name, {}):
                    keys.setdefault(name, stored_key)
        return [(stage, keys[name]) for name, stage in stages.items() if name in keys]

    def find_nearest(self, stage: PlannedStage, stages: Mapping[str, PlannedStage]) -> str | None:
        """Return the key of the newest of the stored entries with the fewest different fields."""
        nearest, fewest = None, 0
        for key in self.manifests.get(stage.name, {}):  # the newest is the last
            count = self.count_differences(stage, key, stages)
            if key != stage.key and (nearest is None or count <= fewest):
                nearest, fewest = key, count
        return nearest

    def count_differences(
        self, stage: PlannedStage, key: str, stages: Mapping[str, PlannedStage]
    ) -> int:
        """Count the fields in which a planned stage, and all that it needs, differ from an entry.

        An input that is no longer in the store counts as one field.
        """
        count, counted, queue = 0, set(), [(stage, key)]
        while queue:
            stage, key = queue.pop()
            if stage.key == key or stage.name in counted:
                continue
            counted.add(stage.name)
            manifest = self.manifests.get(stage.name, {}).get(key)
            if manifest is None:
                count += 1
                continue
            count += len(self.compare_configs(stage, key))
            for role, name in stage.needs.items():
                queue.append((stages[name], manifest.get("needs", {}).get(role, "")))
        return count

    def compare_configs(self, stage: PlannedStage, key: str) -> list[Difference]:
        """Return the fields in which a planned stage differs from an entry, but for its inputs."""
        if (stage.key, key) not in self._differences:
            config = {name: value for name, value in stage.identity.items() if name != "needs"}
            stored = self.manifests[stage.name][key]["config"]
            planned = json.loads(json.dumps(config))  # as a manifest holds it
            self._differences[stage.key, key] = list(iter_differences(stored, planned))
        return self._differences[stage.key, key]

    def explain_stage(
        self, stage: PlannedStage, key: str | None, stages: Mapping[str, PlannedStage]
    ) -> Iterator[str]:
        """Yield lines about one stage, which is compared with the entry `key`."""
        out = self.store.get_path(stage.name, stage.key)
        if out.exists() and (damaged := self.store.find_damaged_files(out)):
            files = ", ".join(damaged[:3])
            yield f"{stage.entry_name} is damaged: {files}. The run makes it again."
            return
        yield f"{stage.entry_name} {'has a result.' if out.exists() else 'is not in the store.'}"
        if draft_path(out).exists():
            yield f"  {describe_draft(out)}"
        entries = self.manifests.get(stage.name, {})
        if key is None:
            yield f"  No other entry of the stage {stage.name} is in the store."
            return
        if out.exists():
            yield f"  Later stages in the store were made from {stage.name}/{key}. It differs in:"
        else:
            which = "nearest" if len(entries) > 1 else "only"
            yield (
                f"  The {which} entry of this stage in the store is {stage.name}/{key}. "
                "It differs in:"
            )
        for name, old, new in self.compare_configs(stage, key):
            note = FIELD_NOTES.get(name.partition(".")[0], "")
            yield f"    {name}: {format_value(old)} -> {format_value(new)}{note}"
        yield from self._explain_needs(stage, key, stages)

    def _explain_needs(
        self, stage: PlannedStage, key: str, stages: Mapping[str, PlannedStage]
    ) -> Iterator[str]:
        """Yield a line for each input whose key differs from the one in the entry `key`."""
        needs = self.manifests[stage.name][key].get("needs", {})
        for role, old in needs.items():
            if role not in stage.needs:
                yield f"    needs.{role}: {old} -> absent"
        for role, name in stage.needs.items():
            old, new = needs.get(role, ABSENT), stages[name].key
            if old != new:
                yield f"    needs.{role}: {old} -> {new} (the stage {name})"

    def describe_stored(self, stage: str, key: str) -> str:
        """Describe an entry that is in the store: its key, its folder and whether it is intact."""
        out = self.store.get_path(stage, key)
        if damaged := self.store.find_damaged_files(out):
            return (
                f"{stage}/{key} in {out} is damaged: {', '.join(damaged[:3])}. The run that needs "
                "it makes it again."
            )
        return f"{stage}/{key} is in {out}"
