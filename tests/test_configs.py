"""Every option composes, plans and names code that exists; experiments and tables say what they are."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

from fp4dit.errors import UserError
from fp4dit.published import published
from pipelines.plan import plan
from pipelines.resolvers import CONF, options
from pipelines.view import columns
from tests.conftest import Compose

NOT_OF_A_RUN = {"hydra", "recipe", "table", "to"}
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in NOT_OF_A_RUN)
OPTIONS = [f"{group}={name}" for group in GROUPS if group != "experiment" for name in options(group)]
FILES = sorted(CONF.rglob("*.yaml"))
EXPERIMENTS, TABLES = options("experiment"), options("table")


def targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, Sequence) and not isinstance(node, str):
        for part in node:
            yield from targets(part)


@pytest.mark.parametrize("file", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_names_real_code(file: Path):
    for target in targets(OmegaConf.to_container(OmegaConf.load(file), resolve=False)):
        assert get_object(target)


@pytest.mark.parametrize("name", [name for name, column in columns().items() if column.interval and ":" not in name])
def test_a_column_compares_if_its_metric_does(name: str):
    found = [node[name] for path in (CONF / "metrics").glob("*.yaml") if name in (node := OmegaConf.load(path))]
    target = next(given._target_ for given in found if "_target_" in given)
    assert columns()[name].compares == get_object(target).compares


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_composes(composed: Compose, option: str):
    assert composed(option).stages.score


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_plans_on_the_shipped_model(composed: Compose, experiment: str):
    steps = plan(composed(f"experiment={experiment}"))
    assert steps["score"].needs["images"] in steps


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_only_overrides_and_says_how_to_run_it(experiment: str):
    lines = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m pipelines.run experiment={experiment}    ")
    assert len(lines) <= 15
    assert all(next(iter(line)).startswith("override /") for line in yaml.safe_load("\n".join(lines))["defaults"])


@pytest.mark.parametrize("group", ["trainer", "logger"])
def test_a_stage_node_names_no_group_that_changes_no_result(group: str):
    for name in options("stages"):
        text = (CONF / "stages" / f"{name}.yaml").read_text()
        for word in (group, "outputs", "progress"):
            assert f"${{{word}" not in text


@pytest.mark.parametrize("table", TABLES)
def test_a_table_names_real_experiments_and_none_of_its_own_is_left_out(table: str):
    rows = yaml.safe_load((CONF / "table" / f"{table}.yaml").read_text())["rows"]
    given = [override for row in rows for override in row["overrides"] if override.startswith("experiment=")]
    named = {override.removeprefix("experiment=") for override in given}
    assert named <= set(EXPERIMENTS)
    assert named >= {name for name in EXPERIMENTS if name.startswith(f"{table}_")}
    assert len({(row["label"], row.get("group")) for row in rows}) == len(rows)
    assert len({tuple(row["overrides"]) for row in rows}) == len(rows)


@pytest.mark.parametrize("table", TABLES)
def test_what_a_table_shows_is_known_and_what_is_published_has_a_source(table: str):
    node, own = (yaml.safe_load((CONF / f"{name}.yaml").read_text()) for name in ("tables", f"table/{table}"))
    known = {**node["others"], **node["columns"], **own.get("columns", {})}
    assert [column for column in own.get("show", []) if column.partition(":")[0] not in known] == []
    data = yaml.safe_load((CONF / "published.yaml").read_text())
    for row in own["rows"]:
        if "published" in row:
            theirs = published(data, row["published"])
            assert set(theirs.values) <= known.keys()
            assert theirs.reason or None not in theirs.values.values()
    assert sum(row.get("reference", False) for row in own["rows"]) <= 1


def test_every_published_entry_says_of_what_it_is():
    """And has numbers, or a reason why it has none."""
    for name, entry in yaml.safe_load((CONF / "published.yaml").read_text()).items():
        for row in entry["rows"]:
            found = published({name: entry}, f"{name}/{row}")
            assert found.source.startswith(entry["paper"])
            assert "model " in found.source
            assert ("notes on the paper" in found.source) == entry.get("secondary", False)
            assert bool(found.reason) == (None in found.values.values())
    with pytest.raises(UserError, match=r"'svdquant/fp15' is not in conf/published.yaml; there are svdquant/fp16"):
        published(yaml.safe_load((CONF / "published.yaml").read_text()), "svdquant/fp15")


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_compose_and_differ(composed: Compose, table: str):
    """On top of the table's base; what a row overrides is to be found there."""
    node = yaml.safe_load((CONF / "table" / f"{table}.yaml").read_text())
    found = [composed(*node.get("base", []), *row["overrides"]) for row in node["rows"]]
    rows = [OmegaConf.to_container(cfg, resolve=False) for cfg in found]
    assert all(a != b for i, a in enumerate(rows) for b in rows[:i])


def test_help_explains_every_group():
    text = (Path(CONF) / "hydra" / "help" / "run.yaml").read_text()
    assert [group for group in GROUPS if f"${{options:{group}}}" not in text] == []


def test_rows_of_the_demo_share_stages(composed: Compose, model: Path):
    def keys(experiment: str) -> dict[str, str]:
        fixed = [f"model.path={model}", f"metrics.clip.path={model}"]
        return {s.name: s.key for s in plan(composed(f"experiment={experiment}", *fixed)).values()}

    rows = {name.removeprefix("demo_")[0]: keys(name) for name in EXPERIMENTS if name.startswith("demo_")}
    quantized = [keys for row, keys in rows.items() if row != "1"]
    assert len({keys["reference"] for keys in rows.values()}) == 1
    assert len({keys["capture"] for keys in quantized}) == 1
    assert rows["3"]["reconstruct"] == rows["6"]["reconstruct"]  # INT4 AdaRound, static and online
    assert rows["4"]["reconstruct"] == rows["7"]["reconstruct"] == rows["8"]["reconstruct"]  # FP4DiT
    assert len({keys["reconstruct"] for keys in quantized}) == 4
    assert len({keys["score"] for keys in rows.values()}) == 8
