"""Searches: results, search spaces, and that no trial is repeated."""

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fp4dit.utils.errors import UserError
from pipelines.search.space import make_distribution, parse_search_space
from tests.conftest import ROOT, Run
from tests.pipelines.cli.test_dry_run import read_table, read_tree

HILL = ["-m", "stages=hill", f"hydra.searchpath=[file://{ROOT}/tests/conf]", "hydra/sweeper=optuna"]
SLOPE = ["rounding.steps=range(20,50,10)", "generation.guidance=-1,3"]


def read_results(outputs: Path) -> dict:
    """Return the results of the last search."""
    last = max((outputs / "sweeps").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    return yaml.safe_load((last / "optimization_results.yaml").read_text())


def read_finished_files(outputs: Path) -> dict[str, tuple[int, bytes]]:
    """Return the time and content of every file in the store outside of drafts."""
    files = {}
    for name, state in read_tree(outputs / "store").items():
        if state[1] and ".draft" not in name:
            files[name] = state
    return files


def test_the_maximum_is_found_without_repeating_trials(run: Run, tmp_path: Path, capfd):
    """The maximum is at 30 steps. The second search has the same seed and more trials."""
    search = [*HILL, *SLOPE, "objective=psnr"]
    assert run(*search, "hydra.sweeper.n_trials=3", "dry_run=true") == 0
    assert not list(tmp_path.iterdir())
    dry_run_jobs = [line[0] for line in read_table(capfd.readouterr().out)[:-1]]

    assert run(*search, "hydra.sweeper.n_trials=6") == 0
    first, before = read_results(tmp_path), read_finished_files(tmp_path)
    output = capfd.readouterr().out
    assert first["best_params"] == {"rounding.steps": 30, "generation.guidance": "3"}
    assert first["best_value"] == 40
    assert "best: psnr 40 by trial" in output
    failed = [i for i, trial in enumerate(first["trials"]) if "failed" in trial]
    assert failed
    assert f"{len(failed)} of 6 trials failed: {', '.join(map(str, failed))}" in output
    for trial in first["trials"]:
        steps, guidance = trial["params"].values()
        expected = (
            {"failed": "RuntimeError: negative guidance"}
            if guidance == "-1"
            else {"values": [40 - (steps - 30) ** 2 / 100]}
        )
        assert trial == {"params": trial["params"], **expected}
    combinations = dict.fromkeys(tuple(trial["params"].values()) for trial in first["trials"])
    assert output.count("Launching 1 jobs") == len(combinations) < 6
    assert dry_run_jobs == [
        f"generation.guidance={g},rounding.steps={s},stages=hill"
        for s, g in list(combinations)[: len(dry_run_jobs)]
    ]
    assert len(dry_run_jobs) > 1

    assert run(*search, "hydra.sweeper.n_trials=7") == 0
    assert read_results(tmp_path)["trials"][:6] == first["trials"]
    after = read_finished_files(tmp_path)
    assert {name: after[name] for name in before} == before


def test_two_objectives_give_the_pareto_front(run: Run, tmp_path: Path):
    """Up to 30 steps cost bits and gain PSNR; more cost both. Two jobs run at a time."""
    search = [
        *HILL,
        "rounding.steps=10,30,50",
        "objective=[psnr,bits_weight]",
        "hydra.sweeper.n_jobs=2",
    ]
    assert (
        run(*search, "hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.n_trials=9") == 0
    )
    results = read_results(tmp_path)
    assert len(results["solutions"]) == 2 < len(results["trials"])
    front = {}
    for solution in results["solutions"]:
        front[solution["params"]["rounding.steps"]] = solution["values"]
    guidance = abs(4.5 - 3)
    assert front == {
        "10": pytest.approx([36 - guidance, 4.1]),
        "30": pytest.approx([40 - guidance, 4.3]),
    }
    assert {trial["params"]["rounding.steps"] for trial in results["trials"]} == {"10", "30", "50"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("generation.guidance=1,3", "a search needs an objective: give objective=psnr"),
        ("objective=psnr", "nothing to search: give an option several values"),
        (
            "objective=psnr generation.guidance=1 rounding=nearest,neerest",
            "rounding=neerest: 'rounding' has no option",
        ),
        (
            "objective=psnr generation.guidance=1,3 hydra.sweeper.direction=max",
            "give maximize or minimize for each",
        ),
        ("objective=psnr generation.guidance=1,3 hydra.sweeper.n_jobs=0", "must be at least 1"),
    ],
)
def test_a_mistake_is_reported_before_a_job_runs(
    run: Run, tmp_path: Path, capfd, overrides: str, message: str
):
    assert run(*HILL, *overrides.split()) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_search_fails_if_all_trials_fail(run: Run, tmp_path: Path):
    with pytest.raises(RuntimeError, match="negative guidance"):
        run(*HILL, "generation.guidance=-1,-2", "objective=psnr", "hydra.sweeper.n_trials=1")


def parse_override(text: str):
    [override] = OverridesParser.create().parse_overrides([text])
    return override


@pytest.mark.parametrize(
    "text", ["range(1,9)", "range(0,10,4)", "range(5,1,-2)", "range(0,1,0.25)", "range(2,3)"]
)
def test_a_range_has_the_numbers_of_hydra(text: str):
    override = parse_override(f"x={text}")
    distribution, numbers = make_distribution(override), sorted(override.sweep_iterator())
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    steps = round((distribution.high - distribution.low) / distribution.step) + 1
    assert [distribution.low + i * distribution.step for i in range(steps)] == pytest.approx(
        numbers
    )
    assert isinstance(distribution.low, int) == isinstance(numbers[0], int)


def test_choices_and_intervals():
    assert make_distribution(parse_override("x=1,b,'c d',1")) == CategoricalDistribution(
        ["1", "b", "'c d'"]
    )
    assert make_distribution(parse_override("x=interval(1,9)")) == FloatDistribution(1.0, 9.0)
    assert make_distribution(parse_override("x=int(interval(1,9))")) == IntDistribution(1, 9)
    assert make_distribution(parse_override("x=tag(log,interval(1e-4,1))")) == FloatDistribution(
        1e-4, 1.0, log=True
    )
    with pytest.raises(UserError, match=r"x=tag\(log,interval\(0,1\)\): .*low"):
        make_distribution(parse_override("x=tag(log,interval(0,1))"))


def test_a_trial_keeps_the_order_of_the_command_line():
    """Hydra applies overrides in this order, so a later one can change an added key."""
    overrides = ["+a={b:1}", "a.b=1,2", "~c", "c=3"]
    space = parse_search_space(OverridesParser.create().parse_overrides(overrides))
    assert space.trial_overrides({"a.b": "2"}) == ("+a={b:1}", "a.b=2", "~c", "c=3")
    assert space.covering_trials == [
        ("+a={b:1}", "a.b=1", "~c", "c=3"),
        ("+a={b:1}", "a.b=2", "~c", "c=3"),
    ]
