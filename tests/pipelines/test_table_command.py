"""The table command on stages that take no time."""

import csv
import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import pipelines.report
import pipelines.table
from pipelines.cli.program import EXPERIMENT_COMMANDS, MODEL_COMMANDS
from pipelines.cli.table_summary import NEXT_STEPS
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options
from tests.conftest import ROOT, TOY, Run

# The rows of a table with one row.
ROWS = "rows: [{label: A, overrides: []}]"


@pytest.fixture
def conf(tmp_path: Path) -> str:
    """Add a table with two rows of toy stages, and return the override that finds it."""
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "toy.yaml").write_text(
        "# @package _global_\npicture: {images: 2}\nrows:\n"
        "  - {label: One, overrides: [stages=toy]}\n"
        "  - {label: Seven, overrides: [stages=toy, generation.seed=7]}\n"
    )
    return f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"


def test_a_picture_of_an_unknown_row_is_refused(run: Run, conf: str, capfd):
    assert run("table=toy", conf, "picture.rows=[Sevn]", main=pipelines.table.main) == 1
    assert "picture.rows has no row 'Sevn'; did you mean Seven?" in capfd.readouterr().err


def test_a_table_prints_results_and_missing_rows(run: Run, conf: str, capfd, tmp_path: Path):
    assert run(*TOY) == 0
    assert run("table=toy", conf, main=pipelines.table.main) == 0
    text = capfd.readouterr().out
    assert "36.0 [35.4, 36.6]" in text
    command = f"python -m pipelines.run stages=toy generation.seed=7 '{conf}' outputs={tmp_path}"
    assert re.search(
        rf"missing: Seven \(about \d s\)\. To make it:\n  {re.escape(command)}\n", text
    )
    tables = tmp_path / "tables"
    assert sorted(p.name for p in tables.iterdir()) == [
        "toy.csv",
        "toy.json",
        "toy.md",
        "toy.png",
        "toy.tex",
    ]
    first, second = csv.DictReader((tables / "toy.csv").read_text().splitlines())
    assert (first["psnr"], first["ssim"], first["n"], first["checkpoint_bytes"]) == (
        "36.0",
        "",
        "10",
        "5250000",
    )
    assert set(second.values()) == {"Seven", ""}
    assert "*" not in text.split("in /")[0]


def test_overrides_are_added_to_every_row(run: Run, conf: str, capfd):
    assert run(*TOY, "calibration.seed=3") == 0
    assert run("table=toy", conf, main=pipelines.table.main) == 0
    assert "missing: One" in capfd.readouterr().out
    assert (
        run("table=toy", conf, 'overrides=["calibration.seed=3"]', main=pipelines.table.main) == 0
    )
    assert "missing: One" not in capfd.readouterr().out


def test_seeds_make_a_row_several_times(run: Run, conf: str, capfd, tmp_path: Path):
    for seed in (0, 1):
        assert run(*TOY, f"seed={seed}") == 0
    table = ["table=toy", conf, "seeds=[0,1]"]
    assert run(*table, main=pipelines.table.main) == 0
    text = capfd.readouterr().out
    assert re.search(r"^One +36\.0 ± 0\.0 \[36\.0, 36\.0\] .* 2$", text, re.MULTILINE)
    overrides = f"stages=toy generation.seed=7 seed=1 '{conf}' outputs={tmp_path}"
    command = f"python -m pipelines.run {overrides}"
    assert re.search(
        rf"missing: Seven, seed 1 \(about \d s\)\. To make it:\n  {re.escape(command)}\n", text
    )
    assert run(*table, "run_missing=true", main=pipelines.table.main) == 0
    shown = capfd.readouterr().out
    assert "missing" not in shown
    first, second = csv.DictReader((tmp_path / "tables" / "toy.csv").read_text().splitlines())
    assert first["seeds"] == second["seeds"] == "2"
    assert (first["psnr_seed0"], first["psnr_seed1"], first["psnr_sd"]) == (
        "36.0",
        "36.0",
        "0.0",
    )


def test_a_finished_table_is_printed_to_the_same_bytes(run: Run, conf: str, tmp_path: Path):
    assert run(*TOY) == run(*TOY, "generation.seed=7") == 0

    def read() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}

    assert run("table=toy", conf, main=pipelines.table.main) == 0
    first = read()
    assert run("table=toy", conf, main=pipelines.table.main) == 0
    assert first == read()
    assert len(first) == 5


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("rows: []", "table=bad has no rows"),
        ("question: Why?", "table=bad has no rows"),
        (
            "rows: [{label: A}]",
            "table=bad: a row has a label and overrides, not {'label': 'A'}",
        ),
        ("rows: [{label: A, overides: []}]", "a row has a label and overrides"),
        (
            "rows: [{label: A, overrides: [], grup: B}]",
            "table=bad, 'A': a row has no 'grup'; did you mean group?",
        ),
        (
            "show: [pnsr]\n" + ROWS,
            "there is no column 'pnsr'; did you mean psnr",
        ),
        ("columns: {psnr: {titel: A}}\n" + ROWS, "table=bad: "),
        (
            "columns: {psnr: {title: P, digits: 1, better: more}}\n" + ROWS,
            "column psnr: better is higher or lower, not 'more'",
        ),
        (
            "rows: [{label: A, overrides: [], published: svdquant/fp15}]",
            "published: 'svdquant/fp15' is not in",
        ),
        ("rows: [{label: A, overrides: [method=none]}]", "'method' has no option 'none'"),
        ("seeds: [0, 0]\n" + ROWS, "seeds=[0, 0]: give different whole numbers"),
        (
            "seeds: [0, 1]\nrows: [{label: A, overrides: [generation.seed=7, method=fp16]}]",
            "A: all seeds make the same",
        ),
    ],
)
def test_an_invalid_table_gets_one_message(run: Run, conf: str, capfd, tmp_path, table, message):
    (tmp_path / "conf" / "table" / "bad.yaml").write_text(
        f"# @package _global_\npicture: {{images: 2}}\n{table}\n"
    )
    assert run("table=bad", conf, main=pipelines.table.main) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert run("table=worse", conf, main=pipelines.table.main) == 1
    assert "'table' has no option 'worse'; " in capfd.readouterr().err


@pytest.fixture
def grouped(tmp_path: Path, conf: str) -> str:
    """Add a table of three rows in one group, of which one cannot be made."""
    (tmp_path / "conf" / "table" / "grouped.yaml").write_text(
        "# @package _global_\npicture: {images: 2}\nfinding: Any will do.\nbase: [stages=toy]\n"
        "columns: {steps: {title: Steps, digits: 0}}\nshow: [psnr, steps]\nrows:\n"
        "  - {label: Five, group: Seeds, overrides: [generation.seed=5]}\n"
        "  - {label: Refused, group: Seeds, overrides: [generation.seed=-1]}\n"
        "  - {label: Seven, group: Seeds, overrides: [generation.seed=7]}\n"
    )
    return conf


def test_missing_rows_are_run_after_a_failure_too(run: Run, grouped: str, capfd, tmp_path: Path):
    assert run(*TOY, "generation.seed=7") == 0
    assert run("table=grouped", grouped, main=pipelines.table.main) == 0
    options = f"table=grouped outputs={tmp_path} '{grouped}' run_missing=true jobs=2"
    command = f"python -m pipelines.table {options}"
    assert f"To make them all (about 0 s on one job):\n  {command}\n" in capfd.readouterr().out
    assert (
        run("table=grouped", grouped, "run_missing=true", "jobs=2", main=pipelines.table.main) == 1
    )
    shown = capfd.readouterr()
    assert "error: 1 of 3 rows failed: Refused, Seeds." in shown.err
    assert "Refused, Seeds: error: generate: a seed cannot be negative\n" in shown.out
    assert "Traceback" not in shown.out
    assert "Seven, Seeds: " not in shown.out  # it was there
    command = (
        f"python -m pipelines.run stages=toy generation.seed=-1 '{grouped}' outputs={tmp_path}"
    )
    assert re.search(
        rf"missing: Refused, Seeds \(about \d s\)\. To make it:\n  {re.escape(command)}\n",
        shown.out,
    )
    assert "To make them all" not in shown.out
    assert "Not complete: 2 of 3 rows\n" in shown.out
    rows = list(csv.DictReader((tmp_path / "tables" / "grouped.csv").read_text().splitlines()))
    assert [(r["label"], r["group"], r["psnr"], r["steps"]) for r in rows] == [
        ("Five", "Seeds", "36.0", ""),
        ("Refused", "Seeds", "", ""),
        ("Seven", "Seeds", "36.0", ""),
    ]


def test_a_summary_ends_with_what_to_try_next(run: Run, conf: str, capfd, tmp_path: Path):
    assert run(*TOY) == 0
    table = ["table=toy", conf]
    assert run(*table, main=pipelines.report.main) == 0
    capfd.readouterr()
    assert run(*table, "summary=true", main=pipelines.table.main) == 0
    text = capfd.readouterr().out
    assert "\nWithout a result: Seven. If a job failed, its error is above; " in text
    assert run(*TOY, "generation.seed=7") == 0
    capfd.readouterr()
    assert run(*table, "summary=true", main=pipelines.table.main) == 0
    grid, *_, sentences, files, steps = read_paragraphs(capfd.readouterr().out)
    assert grid.count("36.0 [35.4, 36.6]") == 2
    assert sentences.endswith("The packed transformer takes 5.2 MB.")
    for place in ("tables/toy.png", "reports/toy.html", "tables/toy.csv"):
        assert str(tmp_path / place) in files
        assert (tmp_path / place).is_file()
    title, *commands = steps.splitlines()
    assert title == "To try next:"
    assert len(commands) == 3


def test_the_steps_to_try_next_exist():
    """Every command, method and option of them is known, and each fits a line."""
    for text, purpose in NEXT_STEPS:
        name, *arguments = shlex.split(text)
        assert name in MODEL_COMMANDS or name in EXPERIMENT_COMMANDS
        assert len(text) + len(purpose) < 120
        for option, value in pairwise(arguments):
            assert option != "--method" or value in list_options("method")
        overrides = [word for word in arguments if re.match(r"\w+=", word)]
        compose_config("run", overrides)


def read_paragraphs(text: str) -> list[str]:
    """Return the parts of a text between blank lines."""
    return re.split(r"\n\n+", text.strip())


def test_at_least_one_job_has_to_run(run: Run, conf: str, capfd):
    assert run("table=toy", conf, "run_missing=true", "jobs=0", main=pipelines.table.main) == 1
    assert "error: jobs=0: at least one job has to run" in capfd.readouterr().err
