"""Keys change with everything that a result depends on; plans run the missing stages only."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from fp4dit.store.store import Store
from fp4dit.utils.errors import UserError
from pipelines.planning.executor import execute_plan, list_pending_stages
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime
from tests.conftest import TOY, Compose

ALL = {"capture", "reconstruct", "activate", "generate", "reference", "score"}
AFTER_WEIGHTS = {"reconstruct", "activate", "generate", "score"}


@pytest.fixture
def keys(composed: Compose, model: Path):
    # The weights do not matter, because nothing runs.
    fixed = [f"model.path={model}", f"metrics.clip.path={model}"]
    return lambda *overrides: {
        s.name: s.key for s in make_plan(composed(*fixed, *overrides)).values()
    }


def on_demand(redone: set[str]) -> set[str]:
    """Return the stages that depend on those that are redone, and run only when asked for."""
    stages = {"export"} if redone else set()
    if "activate" in redone:
        stages.add("histograms")
    return stages


@pytest.mark.parametrize(
    ("override", "redone"),
    [
        ("logger=wandb", set()),
        ("trainer=gpu", set()),
        ("progress=bar", set()),
        ("deterministic=on", set()),
        ("memory_budget_gb=1", set()),
        ("targets=[capture]", set()),
        ("activation=e2m3_token", {"activate", "generate", "score"}),
        ("rounding=nearest", AFTER_WEIGHTS),
        ("weight=int4_g128_minmax", AFTER_WEIGHTS),
        ("calibration.seed=7", {"capture", *AFTER_WEIGHTS}),
        ("generation.seed=7", {"generate", "reference", "score"}),
        ("generation.steps=10", ALL),
        ("model.dtype=float16", ALL),
        ("~metrics.oracle", {"score"}),
        ("stages.activate.version=2", {"activate", "generate", "score"}),
    ],
)
def test_an_override_redoes_only_dependent_stages(keys, override: str, redone: set[str]):
    base, new = keys(), keys(override)
    assert {name for name in new if new[name] != base[name]} == redone | on_demand(redone)


@pytest.mark.parametrize(
    "rounding", ["adaround_scale_aware", "adaround_layerwise", "signround", "stochastic", "nearest"]
)
def test_a_seed_changes_all_stages(composed: Compose, keys, rounding: str):
    base, new = keys(f"rounding={rounding}"), keys(f"rounding={rounding}", "seed=1")
    assert all(base[name] != key for name, key in new.items())
    assert keys(f"rounding={rounding}", "seed=0") == base

    def seeds(*overrides: str) -> list[int]:
        config = composed(f"rounding={rounding}", *overrides)
        return [value for key, value in iter_values(config.stages) if key == "seed"]

    first, second = seeds(), seeds("seed=1")
    assert {1000, 42} <= set(first) <= {1000, 42, 0}
    assert {b - a for a, b in zip(first, second, strict=True)} == {1_000_000}
    assert 7 in seeds("seed=1", "generation.seed=7")


def iter_values(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield the keys and values of the stages' nodes, except those of the prompts."""
    for key, value in config.items():
        if not OmegaConf.is_dict(value):
            yield str(key), value
        elif key not in ("prompts", "evaluation"):
            yield from iter_values(value)


def test_outputs_do_not_enter_identity(composed: Compose, model: Path, tmp_path: Path):
    config = composed(f"model.path={model}", f"metrics.clip.path={model}")
    elsewhere = config.copy()
    elsewhere.outputs = str(tmp_path / "elsewhere")
    assert make_plan(config) == make_plan(elsewhere)


def test_full_precision_shares_the_reference_of_every_method(keys):
    assert keys("method=fp16")["reference"] == keys()["reference"]
    assert keys("method=fp16").keys() == {"reference", "score"}


def test_changed_weights_change_all_keys(keys, model: Path):
    base = keys()
    (model / "weights.safetensors").write_bytes(b"other")
    assert all(base[name] != key for name, key in keys().items())


def test_modification_times_do_not_enter_identity(keys, model: Path):
    base = keys()
    os.utime(model / "weights.safetensors", (1, 1))
    assert base == keys()


def test_a_hub_id_stands_for_itself(composed: Compose, model: Path):
    config = composed("model.path=owner/name", f"metrics.clip.path={model}")
    assert make_plan(config)["capture"].identity["content"]["model"] == "hub:owner/name"


def test_stages_are_ordered_by_need_and_then_as_written(composed: Compose):
    needs = {"c": {}, "b": {"x": "a"}, "a": {}, "d": {"x": "b", "y": "c"}}
    config = OmegaConf.create({"stages": {name: {"needs": its} for name, its in needs.items()}})
    assert list(make_plan(config)) == ["c", "a", "b", "d"]


@pytest.mark.parametrize("needs", [{"b": {"x": "z"}}, {"b": {"x": "z"}, "z": {"x": "b"}}])
def test_impossible_needs_are_refused(composed: Compose, needs):
    config = OmegaConf.create({"stages": {name: {"needs": its} for name, its in needs.items()}})
    with pytest.raises(UserError, match="'b' depends on 'z', which is not defined or depends on"):
        make_plan(config)


class TestExecute:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return Store(tmp_path / "store")

    @pytest.fixture
    def toy(self, composed: Compose, tmp_path: Path):
        def make_toy_plan(*overrides: str):
            return make_plan(composed(*TOY, *overrides))

        return make_toy_plan

    def names(self, stages, targets, store) -> set[str]:
        return {stage.name for stage in list_pending_stages(stages, targets, store)}

    def test_targets_run_only_what_they_need(self, toy, store):
        execute_plan(toy(), ["activate"], store, Runtime())
        assert sorted(p.name for p in store.root.iterdir()) == [
            "activate",
            "capture",
            "reconstruct",
        ]

    def test_stored_stages_do_not_run_their_needs(self, toy, store):
        execute_plan(toy(), ["score"], store, Runtime())
        shutil.rmtree(store.root / "capture")
        shutil.rmtree(store.root / "reconstruct")
        assert self.names(toy(), ["score"], store) == set()
        assert self.names(toy("generation.seed=7"), ["score"], store) == {
            *("capture", "reconstruct", "generate", "reference", "score")
        }

    def test_only_what_changed_runs_again(self, toy, store):
        execute_plan(toy(), ["score"], store, Runtime())
        assert self.names(toy("generation.seed=7"), ["score"], store) == {
            "generate",
            "reference",
            "score",
        }

    def test_all_stages_are_checked_before_one_runs(self, toy, store):
        with pytest.raises(UserError, match="generate: a seed cannot be negative"):
            execute_plan(toy("generation.seed=-1"), ["score"], store, Runtime())
        assert not store.root.exists()

    def test_an_unknown_argument_is_refused(self, toy, store):
        with pytest.raises(UserError, match=r"score: .*unexpected keyword argument 'colour'"):
            execute_plan(toy("+stages.score.colour=red"), ["score"], store, Runtime())
        assert not store.root.exists()

    def test_an_unknown_target_gets_the_list_of_stages(self, toy, store):
        with pytest.raises(UserError, match="'scores'; this method has capture, reconstruct"):
            execute_plan(toy(), ["scores"], store, Runtime())

    def test_a_crash_keeps_the_earlier_stages(self, toy, store):
        with pytest.raises(RuntimeError, match="halfway"):
            execute_plan(toy("generation.seed=13"), ["score"], store, Runtime())
        assert self.names(toy("generation.seed=13"), ["score"], store) == {
            "generate",
            "reference",
            "score",
        }


def test_a_finished_job_does_not_import_torch(tmp_path: Path):
    code = f"""
import sys
sys.argv = ["run", *{TOY!r}, "outputs={tmp_path}"]
from pipelines.run import main, run_command
run_command(main)
if sys.argv[0] == "run":
    print([name for name in ("torch", "diffusers", "lightning", "wandb") if name in sys.modules])
"""
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
    assert done.stdout.splitlines()[-1] == "[]"


def test_changed_prompts_change_the_calibration(keys, tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle")
    base = keys(f"+prompts.calibration.path={file}")
    file.write_text("a blue circle")
    new = keys(f"+prompts.calibration.path={file}")
    redone = {"capture", *AFTER_WEIGHTS}
    assert {name for name in new if new[name] != base[name]} == redone | on_demand(redone)
