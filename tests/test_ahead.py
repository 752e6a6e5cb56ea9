"""A dry run says what the run then does, and leaves everything as it was."""

import re
from pathlib import Path

import pytest

from tests.conftest import TOY, Run

HEADING = ["job", "stage", "what", "time", "GPU memory", "host memory", "disk"]


def shown(text: str) -> list[list[str]]:
    """The lines of the table as words that two spaces part."""
    lines = [re.split(r"  +", line.rstrip()) for line in text.splitlines()]
    start = lines.index(HEADING)
    return [line for line in lines[start + 1 :] if len(line) > 2]


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"")
        for p in [folder, *folder.rglob("*")]
    }


def test_what_is_told_is_what_runs_and_nothing_is_touched(run: Run, tmp_path: Path, capfd):
    before = tree(tmp_path)
    assert run(*TOY, "dry_run=true") == 0
    assert tree(tmp_path) == before
    told = shown(capfd.readouterr().out)
    assert [line[1:3] for line in told[:-1]] == [
        [stage, "to make"] for stage in ("capture", "reconstruct", "activate", "generate", "reference", "score")
    ]
    assert told[0][3] == "not estimated"
    assert told[-1][:2] == ["in all", "6 to make"]
    assert run(*TOY, "targets=[capture]") == 0
    (tmp_path / "store" / "reconstruct").mkdir()
    before = tree(tmp_path)
    capfd.readouterr()
    assert run(*TOY, "++dry_run=True", "targets=[reconstruct]") == 0
    assert tree(tmp_path) == before
    told = shown(capfd.readouterr().out)
    expected = ["there", "to make", "not needed", "not needed", "not needed", "not needed"]
    assert [line[2] for line in told[:-1]] == expected


def test_a_sweep_makes_what_its_jobs_share_once(
    run: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, capfd
):
    """And runs here, whatever launcher the same command uses, such as that of a cluster which is elsewhere."""
    assert run(*TOY) == 0
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))  # in the checkout, other tests may run side by side
    before = tree(tmp_path)
    capfd.readouterr()
    launcher = ["hydra/launcher=slurm", "hydra.launcher.partition=gpu", "+hydra.launcher.additional_parameters.qos=low"]
    assert run("-m", "generation.seed=1,13", "calibration.seed=7", *TOY, "dry_run=true", *launcher) == 0
    assert tree(tmp_path) == before
    assert not list(Path.cwd().iterdir())
    told = shown(capfd.readouterr().out)
    what = {(line[0].split(",")[1], line[1]): line[2] for line in told[:-1]}
    assert len(what) == 12
    first, second = "generation.seed=1", "generation.seed=13"
    assert what[first, "capture"] == what[first, "generate"] == what[second, "reference"] == "to make"
    assert what[second, "capture"].startswith("made by calibration.seed=7,generation.seed=1,")
    assert what[second, "generate"] == "to make"
    assert [line[3] for line in told if line[1] == "capture" and line[2] == "to make"] == ["0 s"]  # its like's
    assert told[-1][1] == "9 to make"


def test_what_an_earlier_job_left_is_said(run: Run, tmp_path: Path, capfd):
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")
    capfd.readouterr()
    assert run(*TOY, "generation.seed=13", "dry_run=true") == 0
    assert ["generate", "to make, from where it was left"] in [line[1:3] for line in shown(capfd.readouterr().out)]


def test_real_stages_are_estimated_and_a_mistake_is_told(run: Run, tmp_path: Path, capfd):
    given = ["dry_run=true", "rounding=nearest", "activation=none"]
    assert run(*given) == 0
    assert not list(tmp_path.iterdir())
    told = {line[1]: line[3:] for line in shown(capfd.readouterr().out)}
    assert [len(told[stage]) for stage in ("capture", "reconstruct", "generate")] == [3, 3, 3]
    assert run("weight.quantizer.granularity.group=100", "dry_run=true") == 1
    assert "a group of 100 does not divide a row of 256 values" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
