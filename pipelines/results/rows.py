"""Rows of a table: the run of each row and seed, and its result in the store."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from fp4dit.store.store import Store
from fp4dit.tables.published import find_published, load_published
from fp4dit.tables.rows import ScoredRow, average_over_seeds, make_scored_row
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json
from pipelines.config.resolvers import suggest_names
from pipelines.planning.plan import PlannedStage
from pipelines.planning.plan_cache import RunPlan, plan_runs

ROW_FIELDS = ("label", "overrides", "group", "reference", "published")


@dataclass(frozen=True)
class PlannedRun:
    """A run, its overrides, and the stages that it consists of.

    Attributes:
        name: Name that is printed: the row's label, group and seed.
        overrides: Command line of `pipelines.run`.
        plan: Stages of the run, or why they cannot be planned.

    Example:
        >>> overrides = ["method=gptq", "seed=1"]
        >>> [plan] = plan_runs([overrides], "outputs", [])
        >>> row = PlannedRun("GPTQ, seed 1", overrides, plan).load_row(store, ScoredRow("GPTQ", {}))
    """

    name: str
    overrides: Sequence[str]
    plan: RunPlan

    @property
    def stages(self) -> Mapping[str, PlannedStage]:
        """Stages by name; empty if the run cannot be planned."""
        return self.plan.stages

    def find_result(self, stage: str, store: Store, *files: str) -> Path | None:
        """Return the folder of a stage if it is finished and `files`, or all files, are intact."""
        return (
            store.find_entry(stage, self.stages[stage].key, *files)
            if stage in self.stages
            else None
        )

    def find_role(self, role: str, store: Store, *files: str) -> Path | None:
        """Return the folder of the stage that plays a role for the scores, such as `images`."""
        if not self.stages:
            return None
        return self.find_result(self.stages["score"].needs[role], store, *files)

    def find_images(self, store: Store, *files: str) -> Path | None:
        """Return the folder of the stage that draws the images."""
        return self.find_role("images", store, *files)

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """Config of the stage that draws the images: model, generation, count."""
        return self.stages[self.stages["score"].needs["images"]].config if self.stages else {}

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Config of each metric that the run is scored by."""
        return self.stages["score"].config.get("metrics", {}) if self.stages else {}

    def load_row(self, store: Store, empty_row: ScoredRow) -> ScoredRow:
        """Return `empty_row` with the numbers of the result, or as it is if there is no result."""
        score, images = self.find_result("score", store), self.find_images(store, "images.json")
        if score is None:
            return empty_row
        drawn = read_json(images / "images.json") if images else ()
        metrics = read_json(score / "metrics.json")
        row = make_scored_row(empty_row.label, metrics, drawn)
        sampler = self.generation_config.get("generation", {})
        return replace(
            row,
            values={
                **row.values,
                "sampling_steps": sampler.get("steps"),
                "guidance": sampler.get("guidance"),
            },
            group=empty_row.group,
            reference=empty_row.reference,
            published=empty_row.published,
            differs=empty_row.differs,
        )


@dataclass(frozen=True)
class TableRow:
    """A row of a table, and its runs by seed.

    Attributes:
        empty_row: Row without numbers, as its config describes it.
        runs: Run of each seed.

    Example:
        >>> row = TableRow(ScoredRow("GPTQ", {}), {0: first_run, 1: second_run})
        >>> psnr = row.load_row(store).values["psnr"]  # the mean over seeds
    """

    empty_row: ScoredRow
    runs: Mapping[int, PlannedRun]

    @property
    def first_run(self) -> PlannedRun:
        """Run of the first seed, whose images and layers are shown."""
        return next(iter(self.runs.values()))

    def load_row(self, store: Store) -> ScoredRow:
        """Return the row with its numbers, averaged over seeds."""
        rows = {seed: run.load_row(store, self.empty_row) for seed, run in self.runs.items()}
        return average_over_seeds(rows)


def plan_table_rows(cfg: DictConfig, name: str) -> list[TableRow]:
    """Plan the runs of all rows of a table.

    Raises:
        UserError: if there are no rows, or a row is invalid.
    """
    if not cfg.get("rows"):
        raise UserError(
            f"table={name} has no rows: give it some, each {{label: ..., overrides: [...]}}"
        )
    nodes: Any = OmegaConf.to_container(cfg.rows)
    for node in nodes:
        check_row(node, name)
    by_row = [list_run_overrides(cfg.base, node, cfg.overrides, cfg.seeds) for node in nodes]
    overrides = [run_overrides for by_seed in by_row for run_overrides in by_seed.values()]
    plans = iter(plan_runs(overrides, cfg.outputs, get_searchpath()))
    outputs = [] if cfg.outputs == "outputs" else [f"outputs={cfg.outputs}"]
    published = load_published()
    rows = []
    for node, by_seed in zip(nodes, by_row, strict=True):
        row_runs = {}
        for seed, run_overrides in by_seed.items():
            run_name = name_run(node, seed, len(by_seed) > 1)
            row_runs[seed] = PlannedRun(run_name, [*run_overrides, *outputs], next(plans))
        differs = next(iter(row_runs.values())).plan.differs
        rows.append(TableRow(make_empty_row(node, published, differs), row_runs))
        check_seeds_differ(rows[-1])
    return rows


def list_run_overrides(
    base: Sequence[str], node: Mapping[str, Any], overrides: Sequence[str], seeds: Any
) -> dict[int, list[str]]:
    """Return the overrides of the runs of a row, by seed.

    Args:
        base: Overrides that stand before those of every row.
        node: Config of the row.
        overrides: Overrides that are added to every row.
        seeds: Option `seeds`: null, a number or a list.

    Raises:
        UserError: if the seeds are not different whole numbers.
    """
    common, runs = [*base, *node["overrides"], *overrides], {}
    for seed in parse_seeds(seeds):
        seed_override = [] if seeds is None else [f"seed={seed}"]
        runs[seed] = [*common, *seed_override, *searchpath_overrides()]
    return runs


def check_seeds_differ(row: TableRow) -> None:
    """Check that the seeds of a row differ.

    Raises:
        UserError: if an override fixes what `seed` is meant to change.
    """
    keys = [run.stages["score"].key for run in row.runs.values() if run.stages]
    if len(set(keys)) < len(keys):
        raise UserError(
            f"{row.empty_row.label}: all seeds make the same images, because its overrides fix "
            "generation.seed"
        )


def check_row(node: Any, name: str) -> None:
    """Check the config of a row of the table `name`.

    Raises:
        UserError: if a field is missing or unknown.
    """
    complete = isinstance(node, dict) and isinstance(node.get("label"), str)
    if not complete or "overrides" not in node:
        raise UserError(f"table={name}: a row has a label and overrides, not {node!r}")
    for field in node:
        if field not in ROW_FIELDS:
            raise UserError(
                f"table={name}, {node['label']!r}: a row has no {field!r}; "
                f"{suggest_names(field, list(ROW_FIELDS))}"
            )


def parse_seeds(seeds: Any) -> list[int]:
    """Return the seeds of the option `seeds`, which is null, a number or a list.

    Raises:
        UserError: if they are not different whole numbers.
    """
    if seeds is None:
        return [0]
    numbers = list(seeds) if isinstance(seeds, list | ListConfig) else [seeds]
    valid = all(isinstance(seed, int) and seed >= 0 for seed in numbers)
    if not numbers or not valid or len(set(numbers)) < len(numbers):
        raise UserError(
            f"seeds={numbers}: give different whole numbers from 0 on, as seeds=[0,1,2]"
        )
    return numbers


def make_empty_row(
    node: Mapping[str, Any], published: Mapping[str, Any], differs: Sequence[str]
) -> ScoredRow:
    """Return a row without numbers, with the published result that its config names."""
    key = node.get("published")
    return ScoredRow(
        node["label"],
        {},
        node.get("group"),
        reference=node.get("reference", False),
        published=find_published(published, key) if key else None,
        differs=differs,
    )


def name_run(node: Mapping[str, Any], seed: int, several_seeds: bool) -> str:
    """Return the printed name of a run: label, group and, if there are several, seed."""
    parts = (node["label"], node.get("group"), f"seed {seed}" if several_seeds else "")
    return ", ".join(part for part in parts if part)


def get_searchpath() -> list[str]:
    """Return the further folders of configs that the command was given."""
    return list(HydraConfig.get().searchpath or ())


def searchpath_overrides() -> list[str]:
    """Return the overrides of Hydra's search path on the command line."""
    overrides = HydraConfig.get().overrides.hydra
    return [override for override in overrides if override.startswith("hydra.searchpath=")]
