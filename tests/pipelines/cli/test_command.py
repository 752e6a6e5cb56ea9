"""Commands as a user runs them, on stages that take no time."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import MissingConfigException
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from submitit.core.utils import UncompletedJobError
from submitit.local.local import LocalJob

import pipelines.convert
import pipelines.dashboard
import pipelines.embed
import pipelines.features
import pipelines.fetch
import pipelines.inspect
import pipelines.pretrain
import pipelines.report
import pipelines.run
import pipelines.store
import pipelines.table
from pipelines.cli.errors import explain_error
from pipelines.config.resolvers import list_options
from tests.conftest import ROOT, TOY, Run


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
        (["weight.ignore=[proj_out]"], "can be added: write +weight.ignore="),
        (["rounding=gptq", "rounding.order=x"], "can be added: write +rounding.order="),
        (
            ["rounding=gptq", "rounding.keep_best=false"],
            "'rounding.keep_best' is not in the configuration; ",
        ),
        (["-m", "rounding=gptq", "weight=e2m1,nf4", "rounding.order=x"], "write +rounding.order="),
        (["experiment=demo_4_fp4dit"], "did you mean demo_4_fp4dit_w4a8"),
        (["zzz=1"], "there are experiment, method, model"),
        (
            ["prompts=file", "prompts.calibration.path=Makefile"],
            "error: prompts.evaluation.path is missing and has no default: "
            "give prompts.evaluation.path=...\n",
        ),
        (["-m", "weight=e2m1_g128,e2m2"], "'weight' has no option 'e2m2'; did you mean e2m1"),
        (
            ["-m", "experiment=glob(demoo*)"],
            "0 jobs: experiment=glob(demoo*) matches nothing; experiment has demo_1",
        ),
        (["generation.steps=[1"], "'generation.steps=[1' cannot be read"),
        (["model.path=/nowhere"], "there is nothing at '/nowhere'"),
        (
            ["model.path=conf"],
            "'conf' is not a diffusers pipeline: the folder has no model_index.json",
        ),
        (["model.path=Makefile"], "'Makefile' is not a diffusers pipeline: this is a file"),
        ([*TOY, "generation.seed=-1"], "generate: a seed cannot be negative"),
        ([*TOY, "targets=[scores]"], "no stage is called 'scores'; this method has capture"),
    ],
)
def test_a_mistake_gets_one_message_and_no_traceback(
    run: Run, capfd, tmp_path: Path, arguments, message: str
):
    assert run(*arguments) == 1
    error = capfd.readouterr().err
    assert message in error
    assert error.count("error:") == 1
    assert "Traceback" not in error
    assert not (tmp_path / "store" / "capture").exists()


def test_an_unavailable_device_is_refused_before_a_stage_runs(
    run: Run, capfd, tmp_path: Path, monkeypatch
):
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
    assert run(*TOY) == run(*TOY, "trainer=gpu") == 0  # nothing is left to compute


@pytest.mark.parametrize(
    ("main", "arguments", "message"),
    [
        (
            pipelines.table.main,
            ["seed=[0,1]"],
            "'seed' is not in the configuration; did you mean seeds",
        ),
        (
            pipelines.table.main,
            ['overrides=["sed=1"]'],
            "'sed' is not in the configuration; did you mean seed",
        ),
        (
            pipelines.table.main,
            ["table=demo", "model.embeddings=x"],
            "'model.embeddings' is not in the configuration; ",
        ),
        (
            pipelines.table.main,
            ["rounding=gptq", "weight=e2m1"],
            "'rounding' is not in the configuration; ",
        ),
        (pipelines.report.main, ["report.pixel=16"], "did you mean report.pixels"),
        (pipelines.inspect.main, ["layer=all"], "did you mean layers"),
        (
            pipelines.store.main,
            ["zzz=1"],
            "'zzz' is not in the configuration; there are do, what, outputs",
        ),
        (
            pipelines.convert.main,
            ["out=x"],
            "error: path is missing and has no default: give path=...\n",
        ),
        (pipelines.embed.main, [], "error: out is missing and has no default: give out=...\n"),
        (pipelines.embed.main, ["out=x", "prompts=file"], "give prompts.calibration.path=...\n"),
        (pipelines.features.main, ["image=x"], "did you mean images"),
        (pipelines.features.main, [], "error: images is missing"),
    ],
)
def test_each_command_knows_its_own_options(
    run: Run, capfd, tmp_path: Path, main, arguments, message: str
):
    has_no_outputs = main in (pipelines.convert.main, pipelines.embed.main, pipelines.features.main)
    assert run(*arguments, main=main, outputs=not has_no_outputs) == 1
    error = capfd.readouterr().err
    assert message in error
    assert "only in the default" not in error
    assert "can be added" not in error
    assert "Traceback" not in error


def test_a_full_disk_is_explained():
    message = explain_error(OSError(errno.ENOSPC, "No space left on device", "outputs/x"))
    assert message == (
        "the disk is full while writing outputs/x. Finished work is kept: "
        "free some space and give the same command again."
    )


def test_a_launcher_job_without_a_result_is_explained(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(LocalJob, "_results_timeout_s", 0)
    with pytest.raises(UncompletedJobError) as lost:
        LocalJob(tmp_path, "12", [0]).result()
    message = explain_error(lost.value)
    assert message
    assert message.startswith("job 12 ended without a result (state: NO PROCESS AND NO RESULT)")
    assert f"{tmp_path}/12_0_log.err" in message


@pytest.mark.parametrize("in_full", [False, True])
def test_a_traceback_is_shown_only_on_request(tmp_path: Path, in_full: bool):
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.run", "weight=fp4dlt", f"outputs={tmp_path}"],
        env={**os.environ, "HYDRA_FULL_ERROR": str(int(in_full))},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert ("Traceback" in process.stderr) == in_full
    assert ("did you mean fp4dit" in process.stderr) != in_full


def test_an_error_of_the_program_is_not_hidden(run: Run):
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")


COMMANDS = (
    *(pipelines.run, pipelines.inspect, pipelines.table, pipelines.report, pipelines.store),
    *(pipelines.convert, pipelines.dashboard, pipelines.embed, pipelines.features),
    *(pipelines.fetch, pipelines.pretrain),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_help_fits_on_a_screen(run: Run, capfd, command):
    assert run("--help", main=command.main, outputs=False) == 0
    lines = capfd.readouterr().out.splitlines()
    assert f"usage: python -m {command.__name__}" in "\n".join(lines)
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 100


def test_help_lists_the_options_of_groups(run: Run, capfd):
    assert run("--help") == 0
    text = capfd.readouterr().out
    assert "  iterations     steps of learned rounding            paper, quick\n" in text
    assert f", ... ({len(list_options('weight'))})\n" in text


def test_parallel_jobs_share_stages_and_fail_alone(tmp_path: Path):
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.launcher.batch_size=1"]
    sweep = ["-m", "generation.seed=1,-1,2", *TOY, f"outputs={tmp_path}", *launcher]
    process = subprocess.run(
        [sys.executable, "-m", "pipelines.run", *sweep], cwd=ROOT, capture_output=True, text=True
    )
    assert process.returncode == 1
    assert "error: generate: a seed cannot be negative" in process.stderr
    assert "Traceback" not in process.stderr + process.stdout
    counts = {"capture": 1, "reconstruct": 1, "generate": 2, "score": 2}
    for stage, count in counts.items():
        assert len(list((tmp_path / "store" / stage).glob("*/manifest.json"))) == count


def test_an_unusable_launcher_says_what_it_needs(run: Run, tmp_path: Path, capfd, monkeypatch):
    for name in ("submitit_slurm", "joblib"):  # the error of Hydra without the package
        error = MissingConfigException("there is none", f"hydra/launcher/{name}")
        assert explain_error(error) == (
            f"hydra/launcher={name} is not installed. To install it: "
            "pip install 'fp4dit[launchers]'"
        )
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run("-m", "generation.seed=1,2", *TOY, "hydra/launcher=slurm") == 1
    assert "error: there is no SLURM here" in capfd.readouterr().err
