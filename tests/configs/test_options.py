"""Every file of conf/ names code that exists, and experiments and tables compose and plan.

The options of all groups are composed in tests/configs/test_presets.py and
tests/pipelines/planning/test_identity.py.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from fp4dit.tables.published import find_published, load_published
from pipelines.config.resolvers import CONF, list_options
from pipelines.planning.plan import make_plan
from pipelines.results.columns import load_catalog
from pipelines.table import ALL_METRICS
from tests.conftest import Compose

NOT_OF_A_RUN = {"hydra", "recipe", "table", "export_format", "world"}
GROUPS = sorted(
    path.name for path in CONF.iterdir() if path.is_dir() and path.name not in NOT_OF_A_RUN
)
OPTIONS: list[str] = []
for _group in GROUPS:
    if _group != "experiment":
        OPTIONS += [f"{_group}={name}" for name in list_options(_group)]
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS, TABLES = list_options("experiment"), list_options("table")


def iter_targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, Sequence) and not isinstance(node, str):
        for part in node:
            yield from iter_targets(part)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_names_real_code(file: Path):
    for target in iter_targets(OmegaConf.to_container(OmegaConf.load(file), resolve=False)):
        assert get_object(target)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans_on_the_shipped_model(composed: Compose, experiment: str):
    steps = make_plan(composed(f"experiment={experiment}"))
    assert steps["score"].needs["images"] in steps


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_only_overrides_and_says_how_to_run_it(experiment: str):
    """Its second line says what it is, and the third has the command that runs it."""
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert re.fullmatch(r"# [A-Z].*\.", lines[1])
    assert lines[2] == f"# Command: python -m pipelines.run experiment={experiment}"
    assert len(lines) <= 15
    for default in yaml.safe_load("\n".join(lines))["defaults"]:
        assert next(iter(default)).startswith("override /")


@pytest.mark.parametrize("group", ["trainer", "logger"])
def test_a_stage_node_names_no_group_that_changes_no_result(group: str):
    for name in list_options("stages"):
        text = (CONF / "stages" / f"{name}.yaml").read_text()
        for word in (group, "outputs", "progress"):
            assert f"${{{word}" not in text


@pytest.mark.parametrize("table", TABLES)
def test_a_table_names_real_experiments_and_all_of_its_own(table: str):
    rows = yaml.safe_load((CONF / "table" / f"{table}.yaml").read_text())["rows"]
    named = set()
    for row in rows:
        for override in row["overrides"]:
            if override.startswith("experiment="):
                named.add(override.removeprefix("experiment="))
    assert named <= set(EXPERIMENTS)
    assert named >= {name for name in EXPERIMENTS if name.startswith(f"{table}_")}
    assert len({(row["label"], row.get("group")) for row in rows}) == len(rows)
    assert len({tuple(row["overrides"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("table", TABLES)
def test_columns_and_published_rows_of_a_table_exist(table: str):
    node = yaml.safe_load((CONF / "table" / f"{table}.yaml").read_text())
    catalog, published = load_catalog(), load_published()
    assert all(name in catalog for name in node.get("show", []) if name != ALL_METRICS)
    for row in node["rows"]:
        if "published" in row:
            columns = find_published(published, row["published"]).values
            assert all(name in catalog for name in columns)
    assert sum(row.get("reference", False) for row in node["rows"]) <= 1


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_compose_and_differ(composed: Compose, table: str):
    """Each row composes on top of the table's base, so all its overrides exist."""
    node = yaml.safe_load((CONF / "table" / f"{table}.yaml").read_text())
    rows = []
    for row in node["rows"]:
        config = composed(*node.get("base", []), *row["overrides"])
        rows.append(OmegaConf.to_container(config, resolve=False))
    for i, row in enumerate(rows):
        assert row not in rows[:i]


def test_help_explains_every_group():
    text = (Path(CONF) / "hydra" / "help" / "run.yaml").read_text()
    assert [group for group in GROUPS if f"${{options:{group}}}" not in text] == []


def test_rows_of_the_demo_share_stages(composed: Compose, model: Path):
    rows = {}
    for name in EXPERIMENTS:
        if name.startswith("demo_"):
            fixed = [f"model.path={model}", f"metrics.clip.path={model}"]
            plan = make_plan(composed(f"experiment={name}", *fixed))
            rows[name.removeprefix("demo_")[0]] = {s.name: s.key for s in plan.values()}
    quantized = [keys for row, keys in rows.items() if row != "1"]
    assert len({keys["reference"] for keys in rows.values()}) == 1
    assert len({keys["capture"] for keys in quantized}) == 1
    assert rows["3"]["reconstruct"] == rows["6"]["reconstruct"]  # INT4 AdaRound, static and dynamic
    assert (
        rows["4"]["reconstruct"] == rows["7"]["reconstruct"] == rows["8"]["reconstruct"]
    )  # FP4DiT
    assert len({keys["reconstruct"] for keys in quantized}) == 4
    assert len({keys["score"] for keys in rows.values()}) == 8
