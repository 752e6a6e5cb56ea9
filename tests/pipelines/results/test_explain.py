"""Explanations of missing results, on the entries that toy stages leave."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import pipelines.store
import pipelines.table
from fp4dit.store.draft import draft_path, lock_path, write_journal
from fp4dit.store.entries import list_entries
from fp4dit.store.locks import hold_lock
from fp4dit.store.store import Store
from pipelines.planning.plan_cache import RunPlan, plan_runs
from pipelines.results.explain import ResultExplainer
from pipelines.store import convert_words
from tests.conftest import TOY, Compose, Run

Explain = Callable[..., str]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finished") / "store"


@pytest.fixture
def explain(run: Run, tmp_path: Path, finished: Path, capfd: pytest.CaptureFixture) -> Explain:
    """The command, which returns what it prints, after one run of the experiment `toy_run`."""
    if not finished.exists():
        assert run("experiment=toy_run", TOY[1]) == 0
        shutil.copytree(tmp_path / "store", finished)
    else:
        shutil.copytree(finished, tmp_path / "store")

    def call(*words: str, code: int = 0) -> str:
        capfd.readouterr()
        arguments = convert_words(["explain", *words, TOY[1]])
        assert run(*arguments, main=pipelines.store.main) == code
        output = capfd.readouterr()
        return output.err if code else output.out

    return call


def list_fields(text: str) -> list[str]:
    """Return the lines about fields, without indentation."""
    return [line.strip() for line in text.splitlines() if " -> " in line]


def find_keys(tmp_path: Path) -> dict[str, str]:
    """Return the key of each stage of the only run in the store."""
    return {entry.stage: entry.key for entry in list_entries(tmp_path / "store")}


def keep_stages(tmp_path: Path, *stages: str) -> None:
    """Remove the results of all other stages from the store."""
    for entry in list_entries(tmp_path / "store"):
        if entry.stage not in stages:
            shutil.rmtree(entry.path)


def plan_keys(tmp_path: Path, *overrides: str) -> dict[str, str]:
    """Return the keys of the stages of a run of the experiment `toy_run`."""
    [plan] = plan_runs([[*TOY, *overrides]], str(tmp_path))
    return {name: stage.key for name, stage in plan.stages.items()}


def test_result_that_exists(explain: Explain, tmp_path: Path):
    key = find_keys(tmp_path)["score"]
    folder = tmp_path / "store" / "score" / key
    assert (
        explain("toy_rows/Default")
        == f"toy_rows/Default has a result. score/{key} is in {folder}\n"
    )
    assert explain(key[:6]) == f"score/{key} is in {folder}\n"
    (folder / "metrics.json").unlink()
    assert f"score/{key} in {folder} is damaged: metrics.json" in explain(f"score/{key}")
    assert f"score/{key} is damaged: metrics.json. The run makes it again." in explain("Default")


def test_changed_override_is_the_field(explain: Explain, tmp_path: Path, composed: Compose):
    """A changed metric changes the last stage alone, and a field that is new has no old value."""
    text = explain("toy_rows/Default", "overrides=['+stages.score.metrics.psnr.border=2']")
    assert list_fields(text) == ["metrics.psnr.border: absent -> 2"]
    assert text.startswith("toy_rows/Default has no result. Stages without one: score\n")
    stored = find_keys(tmp_path)["score"]
    assert f"The only entry of this stage in the store is score/{stored}. It differs in:" in text


def test_chain_where_only_the_first_stage_differs(
    explain: Explain, tmp_path: Path, composed: Compose
):
    """The field is named once, at its stage, and later stages name the input that differs."""
    composed(*TOY)
    old, new = find_keys(tmp_path), plan_keys(tmp_path, "calibration.seed=7")
    text = explain("toy_rows/Default", 'overrides=["calibration.seed=7"]')
    stages = "capture, reconstruct, activate, generate, score"
    assert f"Stages without one: {stages}\n" in text
    fields = list_fields(text)
    assert fields[0] == "calibration: 1000 -> 7"
    assert fields[1] == f"needs.calls: {old['capture']} -> {new['capture']} (the stage capture)"
    assert all(field.startswith("needs.") for field in fields[1:])
    assert "reference" not in text


def test_nearest_entry_has_the_fewest_differences(explain: Explain, tmp_path: Path, run: Run):
    assert run(*TOY, "rounding.steps=700", "generation.seed=8") == 0
    text = explain("toy_rows/Longer", 'overrides=["generation.seed=9"]')
    assert list_fields(text)[0] == "seed: 8 -> 9"
    assert "The nearest entry of this stage in the store is generate/" in text
    assert "reconstruct" not in text
    near = explain("toy_rows/Default", 'overrides=["rounding.steps=800"]')
    assert list_fields(near)[0] == "steps: 700 -> 800"


def test_input_with_a_result_is_compared_too(explain: Explain, tmp_path: Path, run: Run):
    """A later stage may lack a result because its input, which has one, is another."""
    assert run(*TOY, "rounding.steps=700", "targets=[reconstruct]") == 0
    text = explain("Longer")
    assert "Stages without one: activate, generate, score\n" in text
    assert "has a result.\n  Later stages in the store were made from reconstruct/" in text
    assert list_fields(text)[0].endswith("-> 700")


def test_nothing_stored_of_a_stage(explain: Explain, tmp_path: Path):
    shutil.rmtree(tmp_path / "store" / "score")
    text = explain("Default")
    assert "No other entry of the stage score is in the store." in text
    assert list_fields(text) == []
    keep_stages(tmp_path, "reference")
    text = explain("Default")
    assert text.count("No other entry of the stage") == 5


def test_an_empty_store_is_one_line(explain: Explain, tmp_path: Path):
    line = f"The store in {tmp_path / 'store'} has no results yet.\n"
    keep_stages(tmp_path)
    assert explain("Default", "Longer") == line
    shutil.rmtree(tmp_path / "store")
    assert explain("toy_run") == line


def test_table_explains_shared_stages_once(explain: Explain, tmp_path: Path):
    text = explain("toy_run", 'overrides=["calibration.seed=7"]')
    assert text.startswith("toy_run has no result.")  # the experiment of that name
    keep_stages(tmp_path, "reference")
    text = explain("Default", "Longer")
    assert "toy_rows/Default has no result" in text
    assert "toy_rows/Longer, W4A8 has no result" in text
    assert text.count("No other entry of the stage capture") == 1
    assert "has no result, as explained above." in text


def test_key_of_a_planned_stage(
    explain: Explain, tmp_path: Path, composed: Compose, monkeypatch: pytest.MonkeyPatch
):
    composed(*TOY)
    key = plan_keys(tmp_path, "rounding.steps=700")["reconstruct"]
    runs = {"toy": [[*TOY, "rounding.steps=700"]]}
    monkeypatch.setattr("pipelines.results.explain.group_runs", lambda *_: runs)
    text = explain(key)
    assert text.startswith(f"reconstruct/{key} has no result. Stages without one: reconstruct\n")
    [field] = list_fields(text)
    assert field.startswith("steps: ")
    assert field.endswith(" -> 700")


def test_draft_is_described(
    explain: Explain, tmp_path: Path, composed: Compose, monkeypatch: pytest.MonkeyPatch
):
    composed(*TOY)
    key = plan_keys(tmp_path, "rounding.steps=700")["reconstruct"]
    out = tmp_path / "store" / "reconstruct" / key
    draft_path(out).mkdir()
    times = iter([1e9, 1e9 + 3600])
    for seconds in (0.0, 60.0):
        with monkeypatch.context() as patch:
            patch.setattr("time.time", lambda: next(times))
            write_journal(draft_path(out), seconds, {})
    text = explain("Longer")
    first = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9))
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9 + 3600))
    assert f"There is a draft, begun at {first}, last attempt at {last}, 60 s of work; " in text
    assert "no job is working on it, and the next run continues it." in text
    with hold_lock(lock_path(out), "", "a long one"):
        assert "(a long one), since " in explain("Longer")
    monkeypatch.setattr("pipelines.results.explain.group_runs", lambda *_: {})
    assert f"reconstruct/{key} is not finished. There is a draft" in explain(key)


def test_bad_words_get_the_nearest_names(explain: Explain):
    assert "explain needs a row, an experiment, a table or a key" in explain(code=1)
    message = explain("Longger", code=1)
    assert "'Longger' is no row, experiment, table or key; did you mean Longer" in message
    assert "did you mean demo_4_fp4dit_w4a8" in explain("demo_4_fp4dit", code=1)


def test_run_that_cannot_be_planned(tmp_path: Path):
    plan = RunPlan(problem="there is nothing at '/nowhere'")
    lines = list(ResultExplainer(Store(tmp_path)).explain_run("toy", plan))
    assert lines == ["toy cannot be planned: there is nothing at '/nowhere'"]


def test_table_prints_how_to_explain(explain: Explain, run: Run, capfd: pytest.CaptureFixture):
    assert run("table=toy_rows", TOY[1], "show=[psnr]", main=pipelines.table.main) == 0
    command = "python -m pipelines.store explain toy_rows "
    assert f"To see why they are missing:\n  {command}" in capfd.readouterr().out
