"""What a user sees: our commands run as a user runs them, on stages that take no time."""

import csv
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalJob

import pipelines.convert
import pipelines.embed
import pipelines.features
import pipelines.inspect
import pipelines.report
import pipelines.run
import pipelines.store
import pipelines.table
from pipelines.command import explain
from pipelines.resolvers import options
from tests.conftest import TOY, Run

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weight=fp4dlt"], "'weight' has no option 'fp4dlt'; did you mean fp4dit"),
        (["wieght=e2m1"], "'wieght' is not in the configuration; did you mean weight"),
        (
            ["rounding=nearest", "rounding.steps=9"],
            "'rounding.steps' is not in this configuration, only in the default",
        ),
        (["generation.step=3"], "did you mean generation.steps"),
        (["experiment=demo_4_fp4dit"], "did you mean demo_4_fp4dit_w4a8"),
        (["zzz=1"], "there are experiment, method, model"),
        (
            ["prompts=file", "prompts.calibration.path=Makefile"],
            "error: prompts.evaluation.path is left out, and has no default: give prompts.evaluation.path=...\n",
        ),
        (["-m", "weight=e2m1,e2m2"], "'weight' has no option 'e2m2'; did you mean e2m1"),
        (["-m", "experiment=glob(demoo*)"], "0 jobs: experiment=glob(demoo*) matches nothing; experiment has demo_1"),
        (["generation.steps=[1"], "'generation.steps=[1' cannot be read"),
        (["model.path=/nowhere"], "there is nothing at '/nowhere'"),
        (["model.path=conf"], "'conf' is not a diffusers pipeline: the folder has no model_index.json"),
        (["model.path=Makefile"], "'Makefile' is not a diffusers pipeline: this is a file"),
        ([*TOY, "generation.seed=-1"], "generate: a seed cannot be negative"),
        ([*TOY, "targets=[scores]"], "no stage is called 'scores'; this method has capture"),
    ],
)
def test_a_mistake_gets_one_message_and_no_traceback(run: Run, capfd, tmp_path: Path, arguments, message: str):
    assert run(*arguments) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


def test_a_device_that_is_not_here_is_refused_before_a_stage_runs(run: Run, capfd, tmp_path: Path, monkeypatch):
    """A dry run may be for another machine."""
    for kind in (CUDAAccelerator, MPSAccelerator):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    assert run(*TOY, "trainer=gpu", "dry_run=true") == 0
    assert run(*TOY, "trainer=gpu") == 1
    error = capfd.readouterr().err
    assert "error: trainer.accelerator=gpu, trainer.devices=1, " in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()
    assert run(*TOY) == run(*TOY, "trainer=gpu") == 0  # for nothing is left to compute


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (pipelines.table.main, ["seed=[0,1]"], "'seed' is not in the configuration; did you mean seeds"),
        (pipelines.table.main, ['overrides=["sed=1"]'], "'sed' is not in the configuration; did you mean seed"),
        (pipelines.report.main, ["report.pixel=16"], "did you mean report.pixels"),
        (pipelines.inspect.main, ["layer=all"], "did you mean layers"),
        (pipelines.store.main, ["zzz=1"], "'zzz' is not in the configuration; there are do, what, outputs"),
        (pipelines.convert.main, ["out=x"], "error: path is left out, and has no default: give path=...\n"),
        (pipelines.embed.main, [], "error: out is left out, and has no default: give out=...\n"),
        (pipelines.embed.main, ["out=x", "prompts=file"], "give prompts.calibration.path=...\n"),
        (pipelines.features.main, ["image=x"], "did you mean images"),
        (pipelines.features.main, [], "error: images is left out"),
    ],
)
def test_each_command_knows_its_own_options(run: Run, capfd, tmp_path: Path, main, arguments, message: str):
    own = main in (pipelines.convert.main, pipelines.embed.main, pipelines.features.main)
    assert run(*arguments, main=main, outputs=not own) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "only in the default" not in error
    assert "Traceback" not in error


def test_a_full_disk_is_told_in_plain_words():
    message = explain(OSError(errno.ENOSPC, "No space left on device", "outputs/x"))
    assert message == (
        "the disk is full while writing outputs/x. What was finished is kept: "
        "free some space and give the same command again."
    )


def test_a_job_of_a_launcher_that_left_nothing_is_told_in_plain_words(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(LocalJob, "_results_timeout_s", 0)
    with pytest.raises(UncompletedJobError) as lost:
        LocalJob(tmp_path, "12", [0]).result()
    message = explain(lost.value)
    assert message
    assert message.startswith("job 12 ended without a result (state: NO PROCESS AND NO RESULT)")
    assert f"{tmp_path}/12_0_log.err" in message


@pytest.mark.parametrize("in_full", [False, True])
def test_a_traceback_is_for_who_asks(tmp_path: Path, in_full: bool):
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.run", "weight=fp4dlt", f"outputs={tmp_path}"],
        env={**os.environ, "HYDRA_FULL_ERROR": str(int(in_full))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert ("Traceback" in done.stderr) == in_full
    assert ("did you mean fp4dit" in done.stderr) != in_full


def test_an_error_of_ours_is_not_hidden(run: Run):
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")


def test_help_lists_groups_with_their_options(run: Run, capfd):
    assert run("--help") == 0
    text = capfd.readouterr().out
    assert f"  weight       format, scales and granularity of weights    {', '.join(options('weight'))}\n" in text


class TestTable:
    @pytest.fixture
    def conf(self, tmp_path: Path) -> str:
        """A table with two rows of toy stages."""
        (tmp_path / "conf" / "table").mkdir(parents=True)
        (tmp_path / "conf" / "table" / "toy.yaml").write_text(
            "# @package _global_\npicture_prompts: 2\nrows:\n"
            "  - {label: One, overrides: [stages=toy]}\n"
            "  - {label: Seven, overrides: [stages=toy, generation.seed=7]}\n"
        )
        return f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"

    def test_prints_what_is_there_and_how_to_make_the_rest(self, run: Run, conf: str, capfd, tmp_path: Path):
        assert run(*TOY) == 0
        assert run("table=toy", conf, main=pipelines.table.main) == 0
        text = capfd.readouterr().out
        assert "36.0 [35.4, 36.6]" in text
        command = f"python -m pipelines.run stages=toy generation.seed=7 '{conf}' outputs={tmp_path}"
        assert re.search(rf"missing: Seven \(about \d s\)\. To make it:\n  {re.escape(command)}\n", text)
        tables = tmp_path / "tables"
        assert sorted(p.name for p in tables.iterdir()) == ["toy.csv", "toy.json", "toy.md", "toy.png", "toy.tex"]
        first, second = csv.DictReader((tables / "toy.csv").read_text().splitlines())
        assert (first["psnr"], first["ssim"], first["n"], first["checkpoint_bytes"]) == ("36.0", "", "10", "5250000")
        assert set(second.values()) == {"Seven", ""}
        assert "*" not in text.split("in /")[0]

    def test_overrides_are_added_to_every_row(self, run: Run, conf: str, capfd):
        assert run(*TOY, "calibration.seed=3") == 0
        assert run("table=toy", conf, main=pipelines.table.main) == 0
        assert "missing: One" in capfd.readouterr().out
        assert run("table=toy", conf, 'overrides=["calibration.seed=3"]', main=pipelines.table.main) == 0
        assert "missing: One" not in capfd.readouterr().out

    def test_seeds_make_a_row_several_times(self, run: Run, conf: str, capfd, tmp_path: Path):
        for seed in (0, 1):
            assert run(*TOY, f"seed={seed}") == 0
        table = ["table=toy", conf, "seeds=[0,1]"]
        assert run(*table, main=pipelines.table.main) == 0
        text = capfd.readouterr().out
        assert re.search(r"^One +36\.0 ± 0\.0 \[36\.0, 36\.0\] .* 2$", text, re.MULTILINE)
        command = f"python -m pipelines.run stages=toy generation.seed=7 seed=1 '{conf}' outputs={tmp_path}"
        assert re.search(rf"missing: Seven, seed 1 \(about \d s\)\. To make it:\n  {re.escape(command)}\n", text)
        assert run(*table, "run_missing=true", main=pipelines.table.main) == 0
        shown = capfd.readouterr().out
        assert "missing" not in shown
        first, second = csv.DictReader((tmp_path / "tables" / "toy.csv").read_text().splitlines())
        assert first["seeds"] == second["seeds"] == "2"
        assert (first["psnr_seed0"], first["psnr_seed1"], first["psnr_sd"]) == ("36.0", "36.0", "0.0")

    def test_a_table_that_is_there_is_printed_to_the_same_bytes(self, run: Run, conf: str, tmp_path: Path):
        assert run(*TOY) == run(*TOY, "generation.seed=7") == 0
        read = lambda: {path.name: path.read_bytes() for path in (tmp_path / "tables").iterdir()}
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
            ("rows: [{label: A}]", "table=bad: a row has a label and overrides, not {'label': 'A'}"),
            ("rows: [{label: A, overides: []}]", "a row has a label and overrides"),
            ("rows: [{label: A, overrides: [], grup: B}]", "table=bad, 'A': a row has no 'grup'; did you mean group?"),
            (
                "show: [pnsr]\n" + (good := "rows: [{label: A, overrides: []}]"),
                "there is no column 'pnsr'; did you mean psnr",
            ),
            ("columns: {psnr: {titel: A}}\n" + good, "table=bad: "),
            ("columns: {psnr: {better: more}}\n" + good, "column psnr: better is higher or lower, not 'more'"),
            ("rows: [{label: A, overrides: [], published: svdquant/fp15}]", "published: 'svdquant/fp15' is not in"),
            ("rows: [{label: A, overrides: [method=none]}]", "'method' has no option 'none'"),
            ("seeds: [0, 0]\n" + good, "seeds=[0, 0]: give different whole numbers"),
            (
                "seeds: [0, 1]\nrows: [{label: A, overrides: [generation.seed=7, method=fp16]}]",
                "A: all seeds make the same",
            ),
        ],
    )
    def test_a_table_that_is_not_understood_gets_one_message(
        self, run: Run, conf: str, capfd, tmp_path, table, message
    ):
        (tmp_path / "conf" / "table" / "bad.yaml").write_text(f"# @package _global_\npicture_prompts: 2\n{table}\n")
        assert run("table=bad", conf, main=pipelines.table.main) == 1
        error = capfd.readouterr().err
        assert message in error
        assert error.count("error:") == 1
        assert "Traceback" not in error
        assert run("table=worse", conf, main=pipelines.table.main) == 1
        assert "'table' has no option 'worse'; " in capfd.readouterr().err

    @pytest.fixture
    def grouped(self, tmp_path: Path, conf: str) -> str:
        """A table of three rows in one group, one of which cannot be made."""
        (tmp_path / "conf" / "table" / "grouped.yaml").write_text(
            "# @package _global_\npicture_prompts: 2\nfinding: Any will do.\nbase: [stages=toy]\n"
            "columns: {steps: {title: Steps, digits: 0}}\nrows:\n"
            "  - {label: Five, group: Seeds, overrides: [generation.seed=5]}\n"
            "  - {label: Refused, group: Seeds, overrides: [generation.seed=-1]}\n"
            "  - {label: Seven, group: Seeds, overrides: [generation.seed=7]}\n"
        )
        return conf

    def test_makes_what_is_missing_and_goes_on_after_a_failure(self, run: Run, grouped: str, capfd, tmp_path: Path):
        assert run(*TOY, "generation.seed=7") == 0
        assert run("table=grouped", grouped, main=pipelines.table.main) == 0
        command = f"python -m pipelines.table table=grouped outputs={tmp_path} '{grouped}' run_missing=true jobs=2"
        assert f"To make them all (about 0 s on one job):\n  {command}\n" in capfd.readouterr().out
        assert run("table=grouped", grouped, "run_missing=true", "jobs=2", main=pipelines.table.main) == 1
        shown = capfd.readouterr()
        assert "error: 1 of 3 rows failed: Refused, Seeds." in shown.err
        assert "Refused, Seeds: error: generate: a seed cannot be negative\n" in shown.out
        assert "Traceback" not in shown.out
        assert "Seven, Seeds: " not in shown.out  # it was there
        command = f"python -m pipelines.run stages=toy generation.seed=-1 '{grouped}' outputs={tmp_path}"
        assert re.search(rf"missing: Refused, Seeds \(about \d s\)\. To make it:\n  {re.escape(command)}\n", shown.out)
        assert "To make them all" not in shown.out
        assert "Not complete: 2 of 3 rows\n" in shown.out
        rows = list(csv.DictReader((tmp_path / "tables" / "grouped.csv").read_text().splitlines()))
        assert [(r["label"], r["group"], r["psnr"], r["steps"]) for r in rows] == [
            ("Five", "Seeds", "36.0", ""),
            ("Refused", "Seeds", "", ""),
            ("Seven", "Seeds", "36.0", ""),
        ]

    def test_at_least_one_job_has_to_run(self, run: Run, conf: str, capfd):
        assert run("table=toy", conf, "run_missing=true", "jobs=0", main=pipelines.table.main) == 1
        assert "error: jobs=0: at least one job has to run" in capfd.readouterr().err


def test_jobs_side_by_side_share_stages_and_one_that_fails_stops_no_other(tmp_path: Path):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=1"]
    sweep = ["-m", "generation.seed=1,-1,2", *TOY, f"outputs={tmp_path}", *launcher]
    done = subprocess.run([sys.executable, "-m", "pipelines.run", *sweep], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: generate: a seed cannot be negative" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    count = lambda stage: len(list((tmp_path / "store" / stage).glob("*/manifest.json")))
    assert [count(stage) for stage in ("capture", "reconstruct", "generate", "score")] == [1, 1, 2, 2]


def test_a_launcher_that_cannot_work_says_what_it_needs(run: Run, tmp_path: Path, capfd, monkeypatch):
    for name in ("submitit_slurm", "joblib"):  # as Hydra has it where the package is not there
        lacking = MissingConfigException("there is none", f"hydra/launcher/{name}")
        assert explain(lacking) == (
            f"hydra/launcher={name} is not installed. To get it: pip install -c constraints.txt -e '.[launchers]'"
        )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("-m", "generation.seed=1,2", *TOY, "hydra/launcher=slurm") == 1
    assert "error: there is no SLURM here" in capfd.readouterr().err
