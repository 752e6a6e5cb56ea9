"""A table's rows as they are asked for: what a run is to be given for each seed, and what of it is in the store."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError
from fp4dit.published import Published, published
from fp4dit.rows import Row, over_seeds, row
from fp4dit.store import Store
from pipelines.plan import Step
from pipelines.plans import Plan, plans
from pipelines.resolvers import CONF, nearest

FIELDS = ("label", "overrides", "group", "reference", "published")


@dataclass(frozen=True)
class Entry:
    """A run: its name, what it is given, and the stages that this plans."""

    name: str
    arguments: Sequence[str]
    plan: Plan

    @property
    def steps(self) -> Mapping[str, Step]:
        return self.plan.steps

    def find(self, stage: str, store: Store, *files: str) -> Path | None:
        """The stage's folder, if it is finished and these files, or all, are what they were."""
        return store.find(stage, self.steps[stage].key, *files) if stage in self.steps else None

    def images(self, store: Store, *files: str) -> Path | None:
        return self.find(self.steps["score"].needs["images"], store, *files) if self.steps else None

    @property
    def drawing(self) -> Mapping[str, Any]:
        """How its images are drawn: model, generation, count."""
        return self.steps[self.steps["score"].needs["images"]].config if self.steps else {}

    def row(self, store: Store, given: Row) -> Row:
        """`given` with what was measured; without, if nothing was."""
        score, images = self.find("score", store), self.images(store, "images.json")
        if score is None:
            return given
        drawn = json.loads((images / "images.json").read_text()) if images else ()
        found = row(given.label, json.loads((score / "metrics.json").read_text()), drawn)
        sampler = self.drawing.get("generation", {})
        values = {**found.values, "sampling_steps": sampler.get("steps"), "guidance": sampler.get("guidance")}
        return replace(found, values=values, group=given.group, reference=given.reference, published=given.published)


@dataclass(frozen=True)
class Asked:
    """A row of the table, and the runs that make it: one for each seed."""

    bare: Row
    entries: Mapping[int, Entry]

    def row(self, store: Store) -> Row:
        return over_seeds({seed: entry.row(store, self.bare) for seed, entry in self.entries.items()})


def asked(cfg: DictConfig, name: str) -> list[Asked]:
    """The rows of the table of this name, in order.

    Raises:
        UserError: if there are none, or one is not what a row should be.
    """
    if not cfg.get("rows"):
        raise UserError(f"table={name} has no rows: give it some, each {{label: ..., overrides: [...]}}")
    rows: Any = OmegaConf.to_container(cfg.rows)
    for given in rows:
        check(given, name)
    seeds, path = seeded(cfg.seeds), searchpath()
    where = [] if cfg.outputs == "outputs" else [f"outputs={cfg.outputs}"]
    own = lambda seed: [] if cfg.seeds is None else [f"seed={seed}"]
    runs = [[*cfg.base, *given["overrides"], *cfg.overrides, *own(seed), *path] for given in rows for seed in seeds]
    found = iter(plans(runs, cfg.outputs, list(HydraConfig.get().searchpath or ())))
    data: Any = OmegaConf.to_container(OmegaConf.load(CONF / "published.yaml"))
    arguments = iter(runs)
    return [
        distinct(
            Asked(
                bare(given, data),
                {s: Entry(named(given, s, len(seeds) > 1), [*next(arguments), *where], next(found)) for s in seeds},
            )
        )
        for given in rows
    ]


def distinct(row: Asked) -> Asked:
    """The row, whose seeds are what it says they are.

    Raises:
        UserError: if an override fixes what `seed` would move.
    """
    keys = [entry.steps["score"].key for entry in row.entries.values() if entry.steps]
    if len(set(keys)) < len(keys):
        raise UserError(f"{row.bare.label}: all seeds make the same images, for its overrides fix generation.seed")
    return row


def check(given: Any, name: str) -> None:
    if not isinstance(given, dict) or not isinstance(given.get("label"), str) or "overrides" not in given:
        raise UserError(f"table={name}: a row has a label and overrides, not {given!r}")
    for field in given:
        if field not in FIELDS:
            raise UserError(f"table={name}, {given['label']!r}: a row has no {field!r}; {nearest(field, list(FIELDS))}")


def seeded(seeds: Any) -> list[int]:
    found = [0] if seeds is None else list(seeds) if OmegaConf.is_list(seeds) else [seeds]
    if not found or len(set(found)) < len(found) or not all(isinstance(s, int) and s >= 0 for s in found):
        raise UserError(f"seeds={found}: give different whole numbers from 0 on, as seeds=[0,1,2]")
    return found


def bare(given: Mapping[str, Any], data: Mapping[str, Any]) -> Row:
    theirs: Published | None = published(data, given["published"]) if given.get("published") else None
    return Row(given["label"], {}, given.get("group"), reference=given.get("reference", False), published=theirs)


def named(given: Mapping[str, Any], seed: int, several: bool) -> str:
    group, own = given.get("group"), f"seed {seed}" if several else ""
    return ", ".join(text for text in (given["label"], group, own) if text)


def searchpath() -> list[str]:
    return [given for given in HydraConfig.get().overrides.hydra if given.startswith("hydra.searchpath=")]
