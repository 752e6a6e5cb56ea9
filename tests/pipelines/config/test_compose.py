"""Composed configs equal those of Hydra, although compositions are kept."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF, register_resolvers
from tests.conftest import TOY

CASES = [
    [],
    ["method=gptq", "rounding.damping=0.02", "outputs=/a/folder"],
    ["method=gptq", "outputs=/another/folder", "+weight.ignore=[proj_out]", "~prompts.count"],
    ["rounding=nearest", "weight={format: e2m1}", "++seed=3", "metrics=[psnr,ssim]"],
    [*TOY, "generation.seed=7"],
]
MISTAKES = [
    ["rounding.dampening=3"],
    ["weight=int5"],
    ["nothing=3"],
    ["prompts.count=[1"],
    ["prompts.count=1,2"],
    ["~rounding.dampening"],
    ["hydra.searchpath=3"],
]


@pytest.fixture(autouse=True)
def resolvers() -> None:
    register_resolvers()


def compose_with_hydra(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("run", [*overrides])


@pytest.mark.parametrize("overrides", CASES, ids=str)
def test_a_config_equals_that_of_hydra(overrides: list[str]):
    expected = compose_with_hydra(*overrides)
    for _ in range(2):
        config = compose_config("run", overrides)
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(config)


@pytest.mark.parametrize("overrides", MISTAKES, ids=str)
def test_a_mistake_gets_the_error_of_hydra(overrides: list[str]):
    with pytest.raises(HydraException) as expected:
        compose_with_hydra(*overrides)
    for _ in range(2):
        with pytest.raises(HydraException) as raised:
            compose_config("run", overrides)
        assert type(raised.value) is type(expected.value)
        # Hydra's message for a sweep depends on whether it was given in a shell.
        assert str(raised.value).split("'")[0] == str(expected.value).split("'")[0]


def test_a_config_that_is_changed_changes_no_later_one():
    config = compose_config("run", ["method=gptq"])
    config.rounding.damping = 7.0
    assert compose_config("run", ["method=gptq"]).rounding.damping != 7.0


def test_a_file_that_is_changed_is_read_again(tmp_path: Path):
    path = tmp_path / "rounding" / "mine.yaml"
    path.parent.mkdir()
    for count in (1, 22):
        path.write_text(f"_target_: my_package.Mine\ncount: {count}\n")
        config = compose_config("run", ["rounding=mine", f"hydra.searchpath=[file://{tmp_path}]"])
        assert config.rounding.count == count
    path.unlink()
    with pytest.raises(HydraException, match="mine"):
        compose_config("run", ["rounding=mine", f"hydra.searchpath=[file://{tmp_path}]"])
