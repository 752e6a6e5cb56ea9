"""Whatever is asked for is planned, or refused with one message that names what was asked for."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from fp4dit.store import Store
from pipelines.command import check_groups, explain, paths
from pipelines.kinds import check_kinds
from pipelines.plan import pending, plan
from pipelines.resolvers import CONF, options, register
from pipelines.runtime import Runtime
from tests.faults.conftest import LONG
from tests.test_configs import GROUPS

WRONG = [
    "-1",
    "0",
    "0.5",
    "1e9",
    "abc",
    "null",
    "true",
    "nan",
    "inf",
    "[]",
    "[1,2]",
    "{a: 1}",
    "''",
    "??",
    "../x",
    "a.b",
]


@cache
def fields() -> list[str]:
    with configured():
        config = compose("run")
        return [name for name in paths(config) if not OmegaConf.is_dict(OmegaConf.select(config, name))]


@contextmanager
def configured() -> Iterator[None]:
    GlobalHydra.instance().clear()
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def groups() -> st.SearchStrategy[list[str]]:
    chosen = st.sampled_from(GROUPS).flatmap(
        lambda group: st.sampled_from([*options(group), *options(group), "nnoe"]).map(lambda name: f"{group}={name}")
    )
    return st.lists(chosen, max_size=4, unique_by=lambda given: given.split("=")[0])


def values() -> st.SearchStrategy[list[str]]:
    value = st.one_of(st.sampled_from(WRONG), st.integers(-3, 200).map(str))
    name = st.one_of(st.sampled_from(fields()), st.sampled_from(fields()).map(lambda name: f"{name}s"))
    return st.lists(st.tuples(name, value).map("=".join), max_size=2, unique_by=lambda given: given.split("=")[0])


def planned(overrides: Sequence[str], outputs: Path) -> None:
    """As a run does until its stages check themselves, for which models are built."""
    with configured():
        check_groups(overrides)
        config: DictConfig = compose("run", [*overrides, f"outputs={outputs}"])
        check_kinds(config, overrides)
        Runtime.of(config)
        for step in pending(plan(config), config.targets, Store(outputs / "store")):
            step.make()


PYTHONESE = ("not supported between", "has no attribute", "Traceback", "object is not")


@pytest.mark.parametrize("part", range(10 if LONG else 1))  # which several processes can share
@settings(
    max_examples=1000 if LONG else 20,
    derandomize=not LONG,
    database=None,
    phases=[Phase.generate],  # a handful of options is short enough: shrinking them takes half an hour
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(groups=groups(), values=values())
def test_whatever_is_asked_for_is_planned_or_refused_with_one_message(tmp_path_factory, part, groups, values):
    overrides = [*groups, *values]
    try:
        planned(overrides, tmp_path_factory.getbasetemp() / "planned")
    except Exception as error:
        message = explain(error)
        if message is None:
            raise AssertionError(f"a traceback: {' '.join(overrides)}") from error
        assert message.strip()
        assert not any(words in message for words in PYTHONESE), (overrides, message)
        parts = [part for given in overrides for part in (*re.split("[=./]", given), given.partition("=")[2])]
        words = [part for part in parts if len(part) > 1]
        assert any(word in message for word in words), (overrides, message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets=score"], "targets=score: a list is wanted here"),
        (["calibration.trained=0.5"], "calibration.trained=0.5: a whole number is wanted here, such as 128"),
        (["rounding.optimizer.lr=fast"], "rounding.optimizer.lr=fast: a number is wanted here, such as 0.001"),
        (
            ["prompts.calibration.held_out=0.5"],
            "prompts.calibration.held_out=0.5: true or false is wanted here, such as False",
        ),
        (["model.dtype=16"], "model.dtype=16: text (a number that is meant as text wants quotes: "),
        (["weight=3"], "weight=3: after weight= comes a name, one of ams_e2m2_4, "),
        (["weight=[1,2]"], "weight=[1,2]: after weight= comes a name"),
        (["linear=127"], "linear=127: after linear= comes a name"),
        (["linear=null"], "linear=null: after linear= comes a name"),
        (["text_encoder=nan"], "text_encoder=nan: after text_encoder= comes a name"),
        (["weight.quantizer.granularity.group=[1,2]"], "a whole number is wanted here, such as 128"),
        (["rounding.optimizer.lr=inf"], "rounding.optimizer.lr=inf of the stage reconstruct: give a finite number"),
        (["calibration.timesteps=abc"], "calibration.timesteps=abc: a whole number or null is wanted here"),
        (["calibration.timesteps=[1,2]"], "calibration.timesteps=[1, 2]: a whole number or null is wanted here"),
        (["activation.quantizer.format.exponent=null"], "format.exponent=null: a whole number is wanted here"),
        (["calibration.timesteps={a: 1}"], "calibration.timesteps={'a': 1}: a whole number or null is wanted here"),
        (["model.path=null"], "null is no file or folder: give a path in its place"),
        (["generation._target_=../x"], "Error loading '../x'"),
        (["method=ams_fp4_25", "activation._target_=-1"], "name the position too, as in activation.0"),
        (["targets=null"], "targets=null: a list is wanted here"),
        (["activation=int8_static_timesteps", "activation.quantizer.x=1"], "name the position too, as in activation.0"),
        (["method=gptq", "+activation.leave=[a]"], "or leave the override out where the list is empty"),
        (["metrics.psnr._partial_=1"], "_partial_"),
        (["seed=null"], "seed=null: a whole number is wanted here, such as 0"),
        (["progress=foo"], "progress=foo: choose one of auto, bar, lines, none"),
        (["progress=null"], "progress=None: choose one of auto"),
        (["memory_budget_gb=-1"], "memory_budget_gb=-1: give a number of GB, 0 or more"),
        (["memory_budget_gb=null"], "memory_budget_gb=None: give a number of GB, 0 or more"),
        (["targets=[]"], "targets=[] names no stage: give some of capture, reconstruct, "),
        (["deterministic=yes"], "deterministic=yes: choose on, warn or off"),
    ],
)
def test_a_wrong_value_is_named(overrides: list[str], message: str, tmp_path: Path):
    with pytest.raises(Exception) as error:  # noqa: PT011
        planned(overrides, tmp_path)
    assert message in (explain(error.value) or "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["generation.guidance=4", "rounding.optimizer.lr=1"],
        ["calibration.timesteps=10", "joint='${activation}'"],
        ["rounding.steps='${budget.adaround}'", "targets=[capture]", "+export.at_least.psnr=30"],
    ],
)
def test_what_is_meant_is_taken(overrides: list[str], tmp_path: Path):
    planned(overrides, tmp_path)
