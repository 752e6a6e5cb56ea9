"""A dry run shows what the run then does, and leaves everything as it was."""

import re
from pathlib import Path

import pytest

from tests.conftest import TOY, Run

HEADING = ["job", "stage", "state", "time", "GPU memory", "host memory", "disk"]


def read_table(text: str) -> list[list[str]]:
    """Return the cells of the table's lines, which two spaces separate."""
    lines = [re.split(r"  +", line.rstrip()) for line in text.splitlines()]
    start = lines.index(HEADING)
    return [line for line in lines[start + 1 :] if len(line) > 2]


def read_tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modification time and the content of everything in a folder."""
    tree = {}
    for path in [folder, *folder.rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        tree[str(path.relative_to(folder))] = (path.stat().st_mtime_ns, content)
    return tree


def test_a_dry_run_shows_what_runs_and_writes_nothing(run: Run, tmp_path: Path, capfd):
    before = read_tree(tmp_path)
    assert run(*TOY, "dry_run=true") == 0
    assert read_tree(tmp_path) == before
    lines = read_table(capfd.readouterr().out)
    stages = ["capture", "reconstruct", "activate", "generate", "reference", "score"]
    assert [line[1:3] for line in lines[:-1]] == [[stage, "to make"] for stage in stages]
    assert lines[0][3] == "not estimated"
    assert lines[-1][:2] == ["total", "6 to make"]
    assert run(*TOY, "targets=[capture]") == 0
    (tmp_path / "store" / "reconstruct").mkdir()
    before = read_tree(tmp_path)
    capfd.readouterr()
    assert run(*TOY, "++dry_run=True", "targets=[reconstruct]") == 0
    assert read_tree(tmp_path) == before
    lines = read_table(capfd.readouterr().out)
    expected = ["in the store", "to make", *["not needed"] * 4]
    assert [line[2] for line in lines[:-1]] == expected


def test_jobs_of_a_sweep_share_stages(
    run: Run,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    capfd,
):
    """The dry run of a sweep runs here, whatever launcher the same command uses."""
    assert run(*TOY) == 0
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")
    # Other tests may run in the checkout at the same time.
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    before = read_tree(tmp_path)
    capfd.readouterr()
    launcher = [
        "hydra/launcher=slurm",
        "hydra.launcher.partition=gpu",
        "+hydra.launcher.additional_parameters.qos=low",
    ]
    sweep = ["-m", "generation.seed=1,13", "calibration.seed=7"]
    assert run(*sweep, *TOY, "dry_run=true", *launcher) == 0
    assert read_tree(tmp_path) == before
    assert not list(Path.cwd().iterdir())
    lines = read_table(capfd.readouterr().out)
    states = {(line[0].split(",")[1], line[1]): line[2] for line in lines[:-1]}
    assert len(states) == 12
    first, second = "generation.seed=1", "generation.seed=13"
    for job, stage in ((first, "capture"), (first, "generate"), (second, "reference")):
        assert states[job, stage] == "to make"
    assert states[second, "capture"].startswith("made by calibration.seed=7,generation.seed=1,")
    assert states[second, "generate"] == "to make"
    times = [line[3] for line in lines if line[1] == "capture" and line[2] == "to make"]
    assert times == ["0 s"]  # the time of the similar stage
    assert lines[-1][1] == "9 to make"


def test_a_draft_is_resumed(run: Run, tmp_path: Path, capfd):
    with pytest.raises(RuntimeError, match="halfway"):
        run(*TOY, "generation.seed=13")
    capfd.readouterr()
    assert run(*TOY, "generation.seed=13", "dry_run=true") == 0
    lines = read_table(capfd.readouterr().out)
    assert ["generate", "to resume"] in [line[1:3] for line in lines]


def test_real_stages_are_estimated_and_checked(run: Run, tmp_path: Path, capfd):
    assert run("dry_run=true", "rounding=nearest", "activation=none") == 0
    assert not list(tmp_path.iterdir())
    cells = {line[1]: line[3:] for line in read_table(capfd.readouterr().out)}
    assert [len(cells[stage]) for stage in ("capture", "reconstruct", "generate")] == [3, 3, 3]
    assert run("weight.granularity.size=100", "dry_run=true") == 1
    assert "a group of 100 does not divide a row of 256 values" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
