"""Selection of store entries and of configured runs by words of the command line.

A word is the name of a stage, of an experiment, of a table or of a row of a table, or it is the key
of an entry or the beginning of one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fp4dit.store.entries import StoreEntry, list_entries
from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF, suggest_names
from pipelines.planning.plan_cache import RunPlan, parse_searchpath, plan_runs
from pipelines.results.rows import (
    get_searchpath,
    list_run_overrides,
    name_run,
    searchpath_overrides,
)

MIN_KEY_DIGITS = 4  # a shorter word is not taken for the beginning of a key

# The overrides of a run.
Overrides = list[str]


@dataclass(frozen=True)
class ConfiguredRow:
    """A row of a table of `conf/table`.

    Attributes:
        table: Name of the table.
        label: Label of the row.
        name: Label and group of the row.
        runs: Overrides of its runs, one for each seed, by their names.

    Example:
        >>> row = ConfiguredRow("demo", "GPTQ", "GPTQ, 4 bits", {"GPTQ, 4 bits": ["method=gptq"]})
        >>> row.matches("demo/GPTQ")
        True
    """

    table: str
    label: str
    name: str
    runs: Mapping[str, Overrides]

    def matches(self, word: str) -> bool:
        """Return whether a word is the label or the name, with or without `table/` before it."""
        return word.removeprefix(f"{self.table}/") in (self.label, self.name)


def select_entries(words: Sequence[str], cfg: DictConfig, store: Store) -> list[StoreEntry]:
    """Return the entries that at least one of the words names; all entries if there are no words.

    Raises:
        UserError: if a word names nothing.
    """
    entries = list_entries(store.root)
    if not words:
        return entries
    names: set[str] = set()
    for word in words:
        names |= resolve_word(word, cfg, entries)
    return [entry for entry in entries if entry.name in names]


def resolve_word(word: str, cfg: DictConfig, entries: Sequence[StoreEntry]) -> set[str]:
    """Return the names, as stage/key, of the entries that a word may mean.

    Raises:
        UserError: if the word is neither a stage, an experiment, a table nor a key in the store.
    """
    stages = list_stage_names()
    if word in stages:
        return {entry.name for entry in entries if entry.stage == word}
    runs = list_configured_runs(cfg)
    if word in runs:
        return list_entry_names(plan_runs(runs[word], cfg.outputs, get_searchpath()))
    names = {entry.name for entry in entries if matches_key(word, entry.stage, entry.key)}
    if not names:
        known = [*stages, *runs, *(entry.name for entry in entries)]
        raise UserError(
            f"{word!r} is no stage, experiment, table or key that is in the store; "
            f"{suggest_names(word, known)}"
        )
    return names


def matches_key(word: str, stage: str, key: str) -> bool:
    """Return whether a word is a key or its beginning, with or without `stage/` before it.

    >>> matches_key("score/0123", "score", "0123456789abcdef")
    True
    """
    word_stage, _, word_key = word.rpartition("/")
    return (
        len(word_key) >= MIN_KEY_DIGITS and key.startswith(word_key) and word_stage in ("", stage)
    )


def list_entry_names(plans: Sequence[RunPlan]) -> set[str]:
    """Return the names, as stage/key, of all stages of the runs that can be planned."""
    names = set()
    for plan in plans:
        names |= {stage.entry_name for stage in plan.stages.values()}
    return names


def list_configured_runs(cfg: DictConfig) -> dict[str, list[Overrides]]:
    """Return the runs of each experiment and of each table, by its name."""
    return group_runs(list_experiments(cfg), list_rows(cfg))


def group_runs(
    experiments: Mapping[str, Overrides], rows: Sequence[ConfiguredRow]
) -> dict[str, list[Overrides]]:
    """Return the runs of each experiment and of each table of the rows, by its name."""
    runs = {name: [overrides] for name, overrides in experiments.items()}
    for row in rows:
        runs.setdefault(row.table, []).extend(row.runs.values())
    return runs


def list_experiments(cfg: DictConfig) -> dict[str, Overrides]:
    """Return the overrides of each experiment, by its name."""
    common = [*cfg.overrides, *searchpath_overrides()]
    return {name: [f"experiment={name}", *common] for name, _ in iter_config_files("experiment")}


def list_rows(cfg: DictConfig) -> list[ConfiguredRow]:
    """Return the rows of all tables, with a run for each seed.

    The option `overrides` is added to that of a table, and `seeds` replaces that of a table.
    """
    rows = []
    for table, file in iter_config_files("table"):
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
        overrides = [*config.get("overrides", []), *cfg.overrides]
        seeds = config.get("seeds") if cfg.seeds is None else cfg.seeds
        for node in config.get("rows", []):
            by_seed = list_run_overrides(config.get("base", []), node, overrides, seeds)
            runs = {}
            for seed, run_overrides in by_seed.items():
                runs[f"{table}/{name_run(node, seed, len(by_seed) > 1)}"] = run_overrides
            rows.append(ConfiguredRow(table, node["label"], name_run(node, 0, False), runs))
    return rows


def iter_config_files(group: str) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of each option of a group, those of the search path too."""
    for root in [CONF, *map(parse_searchpath, get_searchpath())]:
        for path in sorted((root / group).glob("*.yaml")):
            if not path.name.startswith("_"):
                yield path.stem, path


def list_stage_names() -> list[str]:
    """Return the names that stages have in any file of conf/stages."""
    names: dict[str, None] = {}
    for _, path in iter_config_files("stages"):
        node: Mapping[Any, Any] = OmegaConf.load(path)  # pyright: ignore
        names |= dict.fromkeys(map(str, node))
    return list(names)
