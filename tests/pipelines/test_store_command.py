"""The command `python -m pipelines.store`, on the entries that toy stages leave."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

import pipelines.store
import pipelines.table
from fp4dit.store.draft import entry_path, journal_path, lock_path
from fp4dit.store.locks import hold_lock
from pipelines.results.select import list_configured_runs
from pipelines.store import convert_words
from tests.conftest import ROOT, TOY, Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "store"


@pytest.fixture
def store(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, finished: Path):
    """The command, after two runs. The experiments and tables need only the first one."""
    monkeypatch.setattr("pipelines.results.gc.list_configured_runs", lambda _: {"toy": [TOY]})
    if not finished.exists():
        assert run(*TOY) == 0
        assert run(*TOY, "generation.seed=7") == 0
        shutil.copytree(tmp_path / "store", finished)
    else:
        shutil.copytree(finished, tmp_path / "store")
    return lambda *words: run(*convert_words([*words, TOY[1]]), main=pipelines.store.main)


def list_folders(tmp_path: Path, stage: str) -> list[Path]:
    return sorted(path for path in (tmp_path / "store" / stage).iterdir() if path.is_dir())


def test_words_are_options(tmp_path: Path):
    assert list(convert_words(["export", "a", "it's", "out=x"])) == [
        "out=x",
        "do=export",
        r"what=['a','it\'s']",
    ]
    assert list(convert_words(["--help"])) == ["--help"]


def test_ls_shows_entries_and_their_commands(store, tmp_path: Path, capfd):
    (tmp_path / "store" / "score" / ("0" * 16 + ".draft")).mkdir()
    capfd.readouterr()
    assert store("ls") == 0
    text = capfd.readouterr().out
    assert re.search(r"^capture: 1 of 0.0 MB$", text, re.MULTILINE)
    assert re.search(r"^generate: 2 of 0.0 MB$", text, re.MULTILINE)
    assert re.search(
        r"^  [0-9a-f]{16}  0.0 MB  20..-..-..  0 s  stages=toy generation.seed=7$",
        text,
        re.MULTILINE,
    )
    assert "draft" in text
    assert store("ls", "generate") == 0
    assert "capture" not in capfd.readouterr().out
    [key] = {path.name for path in list_folders(tmp_path, "capture")}
    assert store("ls", key[:5]) == 0
    assert capfd.readouterr().out.startswith("capture: 1 of")
    assert store("ls", "generatte") == 1
    assert "did you mean generate" in capfd.readouterr().err


def test_ls_says_whether_a_draft_is_being_made(store, tmp_path: Path, capfd):
    """A job whose disk is full holds the lock, but cannot say who it is."""
    draft = tmp_path / "store" / "score" / f"{'0' * 16}.draft"
    draft.mkdir()
    lock = lock_path(entry_path(draft))
    with hold_lock(lock, "", "a long one"):
        assert store("ls", "score") == 0
        assert re.search(r"draft .*being made by process \d+ on ", capfd.readouterr().out)
        lock.with_name(f"{lock.name}.json").unlink()
        assert store("ls", "score") == 0
        assert re.search(r"draft .*being made by a job$", capfd.readouterr().out, re.MULTILINE)
    assert store("ls", "score") == 0
    assert "of a job that ended early" in capfd.readouterr().out


def test_ls_shows_differences_without_commands(store, tmp_path: Path, capfd):
    for path in list_folders(tmp_path, "generate"):
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["command"], manifest["sha256"]
        (path / "manifest.json").write_text(json.dumps(manifest))
    capfd.readouterr()
    assert store("ls", "generate") == 0
    assert re.findall(r"seed=\d+", capfd.readouterr().out) == ["seed=42", "seed=7"]


def test_verify_names_damaged_files(store, tmp_path: Path, capfd):
    assert store("verify") == 0
    assert "9 entries of" in capfd.readouterr().out
    capture, generate = list_folders(tmp_path, "capture")[0], list_folders(tmp_path, "generate")[0]
    (capture / "calls" / "00000.safetensors").write_bytes(b"callz")
    (generate / "images" / "00003.png").unlink()
    assert store("verify") == 1
    error = capfd.readouterr().err
    assert f"2 damaged:\ncapture/{capture.name}/calls/00000.safetensors\n" in error
    assert f"generate/{generate.name}/images/00003.png" in error
    assert "Traceback" not in error


def test_gc_removes_unneeded_entries_without_a_holder(store, tmp_path: Path, capfd, caplog):
    root = tmp_path / "store"
    dead, busy, known = "0" * 16, "1" * 16, list_folders(tmp_path, "capture")[0].name
    for key in (dead, busy):
        (root / "score" / f"{key}.draft").mkdir()
        (root / "score" / f"{key}.draft.json").write_text("{}")
    (root / "generate" / f"{dead}.lock").touch()
    (root / "generate" / f"{dead}.lock.json").write_text("{}")
    (root / "generate" / f"{dead}.00003.lock").touch()
    (root / "unknown" / dead).mkdir(parents=True)
    for name, age in (("old", 7200.0), ("new", 0.0)):
        (root / f".{name}.json.1.part").touch()
        os.utime(root / f".{name}.json.1.part", (time.time() - age,) * 2)
    before = {path for path in root.rglob("*") if not path.name.startswith(".")}
    capfd.readouterr()
    with hold_lock(root / "score" / f"{busy}.lock", "", "a long one"):
        before |= set(root.glob("score/*.lock*"))
        assert store("gc") == 0
        text = capfd.readouterr().out
        assert {path for path in root.rglob("*") if not path.name.startswith(".")} == before
        assert re.search(r"generate/[0-9a-f]{16} .* stages=toy generation.seed=7\n", text)
        assert "5 entries to remove" in text  # generate, reference, score, and two drafts
        assert store("gc", "generate") == 0
        assert "1 entries to remove" in capfd.readouterr().out
        assert store("gc", "keep=[reference]") == 0
        assert "4 entries to remove" in capfd.readouterr().out
        assert store("gc", "dry_run=false") == 0
        assert re.search(r"score/1+ stays: process \d+ on .*\(a long one\)", capfd.readouterr().out)
        assert (root / "score" / f"{busy}.draft").is_dir()
    assert list_folders(tmp_path, "capture") == [root / "capture" / known]
    assert [len(list_folders(tmp_path, stage)) for stage in ("generate", "reference")] == [1, 1]
    assert not list(root.glob(f"*/{dead}.*"))
    assert [path.name for path in root.glob("*.part")] == [".new.json.1.part"]
    assert (root / "unknown" / dead).is_dir()
    assert store("verify", "capture", "generate", "score") == 0


def test_gc_spares_the_inputs_of_a_running_job(store, tmp_path: Path, capfd):
    needs = {path.name: path.name for path in list_folders(tmp_path, "generate")}
    draft = tmp_path / "store" / "score" / f"{'1' * 16}.draft"
    draft.mkdir()
    journal_path(draft).write_text(json.dumps({"before": 0, "start": 0, "needs": needs}))
    with hold_lock(lock_path(entry_path(draft)), "", "a long one"):
        assert store("gc", "generate", "dry_run=false") == 0
        assert len(list_folders(tmp_path, "generate")) == 2
    assert store("gc", "generate", "dry_run=false") == 0
    assert len(list_folders(tmp_path, "generate")) == 1


def test_gc_spares_models_of_runs_that_cannot_be_planned(store, tmp_path: Path, capfd, monkeypatch):
    """A run cannot be planned if, for example, the file of its prompts was moved."""
    other = tmp_path / "store" / "capture" / ("2" * 16)
    after = tmp_path / "store" / "score" / ("3" * 16)
    for path, manifest in (
        (other, {"config": {"model": {"path": "/big"}}}),
        (after, {"needs": {"calls": other.name}}),
    ):
        path.mkdir()
        (path / "manifest.json").write_text(json.dumps({"files": {}, **manifest}))
    bad = [*TOY, "model.path=/big", '+stages.score.content="${content_hash:${model.path}}"']
    monkeypatch.setattr("pipelines.results.gc.list_configured_runs", lambda _: {"toy": [TOY, bad]})
    capfd.readouterr()
    assert store("gc", "dry_run=false") == 0
    text = capfd.readouterr().out
    assert "1 rows cannot be planned: there is nothing at '/big'" in text
    assert "2 entries stay" in text
    assert other.exists()
    assert after.exists()


def test_gc_keeps_results_of_a_tables_own_overrides_and_seeds(
    run: Run, tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "own.yaml").write_text(
        "# @package _global_\nbase: [stages=toy]\noverrides: [rounding.steps=700]\n"
        "seeds: [0, 1]\nrows: [{label: One, overrides: []}]\n"
    )
    monkeypatch.setattr(
        "pipelines.results.gc.list_configured_runs",
        lambda cfg: {"own": list_configured_runs(cfg)["own"]},
    )
    place = f"hydra.searchpath=[file://{ROOT}/tests/conf,file://{tmp_path}/conf]"
    for seed in (0, 1, 2):
        assert run("stages=toy", "rounding.steps=700", f"seed={seed}", place) == 0
    gc = list(convert_words(["gc", "dry_run=false", place]))
    assert run(*gc, main=pipelines.store.main) == 0
    assert len(list_folders(tmp_path, "score")) == 2
    capfd.readouterr()
    arguments = ["table=own", "show=[psnr]", place]
    assert run(*arguments, main=pipelines.table.main) == 0
    text = capfd.readouterr().out
    assert "missing" not in text
    assert re.search(r"^One +36\.0 ± 0\.0 ", text, re.MULTILINE)
    assert run(*gc, 'overrides=["calibration.seed=7"]', main=pipelines.store.main) == 0
    assert list_folders(tmp_path, "score") == []


def test_exported_entries_are_there_after_an_import(store, tmp_path: Path, capfd, run: Run):
    out = tmp_path / "some.tar"
    assert store("export", "capture", "score", f"out={out}") == 0
    assert "3 entries" in capfd.readouterr().out
    for stage in ("capture", "score"):
        for path in list_folders(tmp_path, stage):
            path.rename(tmp_path / path.name)
    assert store("import", str(out)) == 0
    assert capfd.readouterr().out.count("added") == 3
    assert run(*TOY) == 0
    assert store("verify") == 0
    assert store("import", str(tmp_path / "none.tar")) == 1
    assert "there is no file at" in capfd.readouterr().err
    assert store("export", "capture") == 1
    assert "Give out=file.tar" in capfd.readouterr().err
    assert store("lss") == 1
    assert "there is no 'lss'; did you mean ls?" in capfd.readouterr().err
