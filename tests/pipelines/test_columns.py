"""Metric classes describe their columns, and tables name the metrics that they do not show."""

import csv
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import pipelines.table
from fp4dit.metrics.base import PerImageMetric
from fp4dit.metrics.full_reference import PSNR
from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import CONF
from pipelines.results.columns import COST_COLUMNS, load_catalog
from pipelines.stages.scalars import STAGE_SCALARS
from tests.conftest import ROOT, Run

CATALOG = load_catalog()


class Untitled(PerImageMetric):
    about = "A metric that forgets its title"


@pytest.mark.parametrize("name", CATALOG.metrics)
def test_every_metric_is_a_column(name: str):
    """Check title and direction. Titles of per-image metrics are all different."""
    column = CATALOG.find_column(name)
    assert column.title
    assert column.better in ("higher", "lower")
    assert column.per_image != column.per_set
    others = [CATALOG.find_column(other) for other in CATALOG.metrics if other != name]
    assert column.per_set or column.title not in [other.title for other in others]


def test_a_column_is_described_by_the_class():
    column = CATALOG.find_column("psnr")
    assert (column.title, column.digits, column.better) == (PSNR.title, PSNR.digits, "higher")
    assert column.compares_to_reference
    assert CATALOG.find_column("kid").format_number(0.00123) == "1.23"


def test_a_group_of_prompts_is_a_column():
    column = CATALOG.find_column("hps_v2_1:concept-art")
    assert (column.name, column.title) == ("hps_v2_1:concept-art", "HPS v2.1, concept art")


def test_a_metric_without_a_title_is_refused():
    catalog = load_catalog({"mine": {"_target_": f"{__name__}.Untitled"}})
    with pytest.raises(UserError, match="the metric Untitled cannot be printed: give its class"):
        catalog.find_column("mine")


def test_a_run_refuses_a_metric_without_a_title(run: Run, tmp_path: Path, capfd):
    """No stage runs, because no table could print the values."""
    metric = "{_target_: tests.pipelines.test_columns.Untitled, _partial_: true}"
    assert run(f"+metrics.mine={metric}") == 1
    assert "the metric Untitled cannot be printed: give its class" in capfd.readouterr().err
    assert not list((tmp_path / "store").glob("*/*"))


def test_a_class_that_is_not_a_metric_is_refused():
    catalog = load_catalog({"mine": {"_target_": "pathlib.Path"}})
    with pytest.raises(UserError, match=r"metrics\.mine: pathlib\.Path is not a metric"):
        catalog.find_column("mine")


def test_an_unknown_column_is_refused():
    with pytest.raises(UserError, match="there is no column 'pnsr'; did you mean psnr"):
        CATALOG.find_column("pnsr")


def test_scalars_of_a_result_have_columns():
    assert {*STAGE_SCALARS, *COST_COLUMNS, "n"} <= CATALOG.numbers.keys()
    for name in ("block_error", "loss"):
        assert CATALOG.find_column(name).better == "lower"
    base = OmegaConf.load(CONF / "table" / "_base.yaml")
    assert set(base.show) <= {*CATALOG.numbers, pipelines.table.ALL_METRICS}


@pytest.fixture
def print_toy_table(run: Run, tmp_path: Path):
    """Print a table of one row of toy stages, and return the header of its CSV."""

    def print_table(show: str = "") -> list[str]:
        folder = tmp_path / "conf" / "table"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "toy.yaml").write_text(
            "# @package _global_\npicture: {images: 1}\n"
            f"{show}rows: [{{label: One, overrides: [stages=toy]}}]\n"
        )
        searchpath = f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"
        assert run("table=toy", searchpath, main=pipelines.table.main) == 0
        with open(tmp_path / "tables" / "toy.csv", newline="") as file:
            return next(csv.reader(file))

    return print_table


def test_every_metric_is_shown_by_default(print_toy_table, capfd):
    header = print_toy_table()
    metrics = ("psnr", "ssim", "oracle", "clip")
    expected = [f"{metric}{end}" for metric in metrics for end in ("", "_low", "_high")]
    numbers = ("block_error", "call_error", "bits_weight", "bits_activation", "checkpoint_bytes")
    assert header == ["label", *expected, *numbers, "calibration_seconds", "n"]
    assert "not shown" not in capfd.readouterr().out


def test_metrics_that_are_not_shown_are_named(print_toy_table, capfd):
    assert print_toy_table("show: [psnr, n]\n") == ["label", "psnr", "psnr_low", "psnr_high", "n"]
    assert "scored but not shown: ssim, oracle, clip." in capfd.readouterr().out
