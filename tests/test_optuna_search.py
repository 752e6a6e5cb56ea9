"""Searches: what is found, what is not done twice, and what a command line offers to choose from."""

from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from fp4dit.errors import UserError
from pipelines.space import distribution, space
from tests.conftest import ROOT, Run
from tests.test_ahead import shown, tree

HILL = ["-m", "stages=hill", f"hydra.searchpath=[file://{ROOT}/tests/conf]", "hydra/sweeper=optuna"]
SLOPE = ["rounding.steps=range(20,50,10)", "generation.guidance=-1,3"]


def results(outputs: Path) -> dict:
    """Of the last search."""
    last = max((outputs / "sweeps").iterdir(), key=lambda folder: folder.stat().st_mtime_ns)
    return yaml.safe_load((last / "optimization_results.yaml").read_text())


def made(outputs: Path) -> dict[str, tuple[int, bytes]]:
    """Every file that is finished, and when it was written."""
    return {name: state for name, state in tree(outputs / "store").items() if state[1] and ".draft" not in name}


def test_the_summit_is_found_and_nothing_is_made_twice(run: Run, tmp_path: Path, capfd):
    """The summit is at 30 steps. The second search has the same seed and more trials."""
    given = [*HILL, *SLOPE, "objective=psnr"]
    assert run(*given, "hydra.sweeper.n_trials=3", "dry_run=true") == 0
    assert not list(tmp_path.iterdir())
    ahead = [line[0] for line in shown(capfd.readouterr().out)[:-1]]

    assert run(*given, "hydra.sweeper.n_trials=6") == 0
    first, before, told = results(tmp_path), made(tmp_path), capfd.readouterr().out
    assert first["best_params"] == {"rounding.steps": 30, "generation.guidance": "3"}
    assert first["best_value"] == 40
    assert "best: psnr 40 by trial" in told
    failed = [i for i, trial in enumerate(first["trials"]) if "failed" in trial]
    assert failed
    assert f"{len(failed)} of 6 trials failed: {', '.join(map(str, failed))}" in told
    for trial in first["trials"]:
        steps, guidance = trial["params"].values()
        expected = (
            {"failed": "RuntimeError: no way up"} if guidance == "-1" else {"values": [40 - (steps - 30) ** 2 / 100]}
        )
        assert trial == {"params": trial["params"], **expected}
    chosen = dict.fromkeys(tuple(trial["params"].values()) for trial in first["trials"])
    assert told.count("Launching 1 jobs") == len(chosen) < 6
    assert ahead == [f"generation.guidance={g},rounding.steps={s},stages=hill" for s, g in list(chosen)[: len(ahead)]]
    assert len(ahead) > 1

    assert run(*given, "hydra.sweeper.n_trials=7") == 0
    assert results(tmp_path)["trials"][:6] == first["trials"]
    assert {name: state for name, state in made(tmp_path).items() if name in before} == before


def test_of_two_objectives_those_that_no_other_beats_are_kept(run: Run, tmp_path: Path):
    """More steps, up to 30, cost bits and bring PSNR; more than 30 cost both. Jobs that go two at a time go so."""
    given = [*HILL, "rounding.steps=10,30,50", "objective=[psnr,bits_weight]", "hydra.sweeper.n_jobs=2"]
    assert run(*given, "hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.n_trials=9") == 0
    found = results(tmp_path)
    assert len(found["solutions"]) == 2 < len(found["trials"])
    front = {one["params"]["rounding.steps"]: one["values"] for one in found["solutions"]}
    guidance = abs(4.5 - 3)
    assert front == {"10": pytest.approx([36 - guidance, 4.1]), "30": pytest.approx([40 - guidance, 4.3])}
    assert {trial["params"]["rounding.steps"] for trial in found["trials"]} == {"10", "30", "50"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("generation.guidance=1,3", "a search goes by a score: give objective=psnr"),
        ("objective=psnr", "nothing to search: give an option several values"),
        ("objective=psnr generation.guidance=1 rounding=nearest,neerest", "rounding=neerest: 'rounding' has no option"),
        ("objective=psnr generation.guidance=1,3 hydra.sweeper.direction=max", "maximize or minimize is wanted"),
        ("objective=psnr generation.guidance=1,3 hydra.sweeper.n_jobs=0", "must be at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_runs(run: Run, tmp_path: Path, capfd, given: str, message: str):
    assert run(*HILL, *given.split()) == 1
    assert message in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_search_of_which_all_trials_fail_fails(run: Run, tmp_path: Path):
    with pytest.raises(RuntimeError, match="no way up"):
        run(*HILL, "generation.guidance=-1,-2", "objective=psnr", "hydra.sweeper.n_trials=1")


def parsed(text: str):
    [override] = OverridesParser.create().parse_overrides([text])
    return override


@pytest.mark.parametrize("text", ["range(1,9)", "range(0,10,4)", "range(5,1,-2)", "range(0,1,0.25)", "range(2,3)"])
def test_a_range_has_the_numbers_that_hydra_has(text: str):
    override = parsed(f"x={text}")
    found, numbers = distribution(override), sorted(override.sweep_iterator())
    assert isinstance(found, IntDistribution | FloatDistribution)
    steps = round((found.high - found.low) / found.step) + 1
    assert [found.low + i * found.step for i in range(steps)] == pytest.approx(numbers)
    assert isinstance(found.low, int) == isinstance(numbers[0], int)


def test_choices_and_intervals_are_as_they_are_written():
    assert distribution(parsed("x=1,b,'c d',1")) == CategoricalDistribution(["1", "b", "'c d'"])
    assert distribution(parsed("x=interval(1,9)")) == FloatDistribution(1.0, 9.0)
    assert distribution(parsed("x=int(interval(1,9))")) == IntDistribution(1, 9)
    assert distribution(parsed("x=tag(log,interval(1e-4,1))")) == FloatDistribution(1e-4, 1.0, log=True)
    with pytest.raises(UserError, match=r"x=tag\(log,interval\(0,1\)\): .*low"):
        distribution(parsed("x=tag(log,interval(0,1))"))


def test_a_trial_keeps_the_order_of_the_command_line():
    """In which Hydra applies them: what is added may be changed by what follows."""
    given = ["+a={b:1}", "a.b=1,2", "~c", "c=3"]
    found = space(OverridesParser.create().parse_overrides(given))
    assert found.overrides({"a.b": "2"}) == ("+a={b:1}", "a.b=2", "~c", "c=3")
    assert found.each == [("+a={b:1}", "a.b=1", "~c", "c=3"), ("+a={b:1}", "a.b=2", "~c", "c=3")]
