"""Any configuration is planned, or gives one error message that names a part of it."""

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

from fp4dit.store.store import Store
from pipelines.cli.errors import explain_error, list_config_paths
from pipelines.cli.main import check_group_values
from pipelines.config.resolvers import CONF, list_options, register_resolvers
from pipelines.config.validation import check_override_types
from pipelines.planning.executor import list_pending_stages
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime
from tests.configs.test_options import GROUPS
from tests.faults.conftest import LONG

WRONG_VALUES = [
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
def list_fields() -> list[str]:
    """Return the paths of all values of conf/run.yaml."""
    with hydra_initialized():
        config = compose("run")
        names = list_config_paths(config)
        return [name for name in names if not OmegaConf.is_dict(OmegaConf.select(config, name))]


@contextmanager
def hydra_initialized() -> Iterator[None]:
    """Initialize Hydra with the project's configs."""
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


def draw_groups() -> st.SearchStrategy[list[str]]:
    """Draw choices of options, now and then an unknown one."""
    choice = st.sampled_from(GROUPS).flatmap(
        lambda group: st.sampled_from([*list_options(group), *list_options(group), "nnoe"]).map(
            lambda name: f"{group}={name}"
        )
    )
    return st.lists(choice, max_size=4, unique_by=lambda override: override.split("=")[0])


def draw_values() -> st.SearchStrategy[list[str]]:
    """Draw overrides of values, many of them wrong, and some of unknown fields."""
    value = st.one_of(st.sampled_from(WRONG_VALUES), st.integers(-3, 200).map(str))
    name = st.one_of(
        st.sampled_from(list_fields()), st.sampled_from(list_fields()).map(lambda name: f"{name}s")
    )
    return st.lists(
        st.tuples(name, value).map("=".join),
        max_size=2,
        unique_by=lambda override: override.split("=")[0],
    )


def plan_run(overrides: Sequence[str], outputs: Path) -> None:
    """Plan a run as `pipelines.run` does, up to the checks of stages, which build models."""
    with hydra_initialized():
        check_group_values(overrides)
        config: DictConfig = compose("run", [*overrides, f"outputs={outputs}"])
        check_override_types(config, overrides)
        Runtime.from_config(config)
        for step in list_pending_stages(
            make_plan(config), config.targets, Store(outputs / "store")
        ):
            step.instantiate_stage()


PYTHON_TEXTS = ("not supported between", "has no attribute", "Traceback", "object is not")


@pytest.mark.parametrize("part", range(10 if LONG else 1))  # processes can share the parts
@settings(
    max_examples=1000 if LONG else 20,
    derandomize=not LONG,
    database=None,
    phases=[Phase.generate],  # shrinking takes half an hour, and examples have few options anyway
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(groups=draw_groups(), values=draw_values())
def test_any_configuration_is_planned_or_refused(tmp_path_factory, part, groups, values):
    overrides = [*groups, *values]
    try:
        plan_run(overrides, tmp_path_factory.getbasetemp() / "planned")
    except Exception as error:
        message = explain_error(error)
        if message is None:
            raise AssertionError(f"a traceback: {' '.join(overrides)}") from error
        assert message.strip()
        assert not any(words in message for words in PYTHON_TEXTS), (overrides, message)
        parts = []
        for override in overrides:
            parts += [*re.split("[=./]", override), override.partition("=")[2]]
        words = [part for part in parts if len(part) > 1]
        assert any(word in message for word in words), (overrides, message)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets=score"], "targets=score: expected a list"),
        (
            ["calibration.num_prompts=0.5"],
            "calibration.num_prompts=0.5: expected a whole number, such as 128",
        ),
        (
            ["rounding.optimizer.lr=fast"],
            "rounding.optimizer.lr=fast: expected a number, such as 0.001",
        ),
        (
            ["prompts.calibration.held_out=0.5"],
            "prompts.calibration.held_out=0.5: expected true or false, such as False",
        ),
        (
            ["model.dtype=16"],
            "model.dtype=16: expected text (put a number that is meant as text in quotes: ",
        ),
        (["weight=3"], "weight=3: give weight the name of an option, one of e2m1"),
        (["weight=[1,2]"], "weight=[1,2]: give weight the name of an option"),
        (["lowbit_linear=127"], "lowbit_linear=127: give lowbit_linear the name of an option"),
        (["lowbit_linear=null"], "lowbit_linear=null: give lowbit_linear the name of an option"),
        (["text_encoder=nan"], "text_encoder=nan: give text_encoder the name of an option"),
        (
            ["weight.granularity.size=[1,2]"],
            "expected a whole number, such as 128",
        ),
        (
            ["rounding.optimizer.lr=inf"],
            "rounding.optimizer.lr=inf of the stage reconstruct: give a finite number",
        ),
        (
            ["calibration.timesteps=abc"],
            "calibration.timesteps=abc: expected a whole number or null",
        ),
        (
            ["calibration.timesteps=[1,2]"],
            "calibration.timesteps=[1, 2]: expected a whole number or null",
        ),
        (
            ["activation.format=null"],
            "activation.format=null: expected text",
        ),
        (
            ["calibration.timesteps={a: 1}"],
            "calibration.timesteps={'a': 1}: expected a whole number or null",
        ),
        (["model.path=null"], "null is neither a file nor a folder: give a path in its place"),
        (["generation._target_=../x"], "generation._target_=../x: give the path by which"),
        (
            ["method=ams_fp4_25", "activation._target_=-1"],
            "in an override holds a list",
        ),
        (["targets=null"], "targets=null: expected a list"),
        (
            ["activation=int8_tensor_static_tfmq", "activation.quantizer.x=1"],
            "'activation.quantizer.x' is not in the configuration",
        ),
        (
            ["method=gptq", "+activation.ignore=[a]"],
            "in an override holds a list",
        ),
        (["metrics.psnr._partial_=1"], "_partial_"),
        (["seed=null"], "seed=null: give a whole number, such as 0"),
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
        plan_run(overrides, tmp_path)
    assert message in (explain_error(error.value) or "")


@pytest.mark.parametrize(
    "overrides",
    [
        ["generation.guidance=4", "rounding.optimizer.lr=1"],
        ["calibration.timesteps=10", "quantize_inputs_while_rounding='${activation}'"],
        [
            "rounding.steps='${iterations.adaround}'",
            "targets=[capture]",
            "+export.at_least.psnr=30",
        ],
    ],
)
def test_valid_overrides_are_accepted(overrides: list[str], tmp_path: Path):
    plan_run(overrides, tmp_path)
