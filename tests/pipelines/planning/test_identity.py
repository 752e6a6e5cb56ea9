"""A stage's key depends on tags, so that classes and modules can move and be renamed."""

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4dit.registry import KINDS
from fp4dit.utils.hub import resolve_package_path
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import list_options, register_resolvers
from pipelines.planning.plan import make_plan, make_planned_stage
from pipelines.planning.stage_kinds import FOLDER_KINDS, STAGE_KINDS, make_identity
from tests.configs.test_options import OPTIONS
from tests.configs.test_presets import TESTED_GROUPS
from tests.conftest import Compose
from tests.helpers.identities import find_own_paths

DEMO = [name for name in list_options("experiment") if name.startswith("demo_")]

DETAILED = "demo_4_fp4dit_w4a8"

# The keys of the demo's rows. They change when a config, the shipped weights or the
# version of a stage changes on purpose; a move or a new name must not change them.
KEYS: dict[str, str] = {
    "demo_1_full_precision/score": "c0decf92175303c8",
    "demo_2_int4_nearest/score": "b239c116ffd8caa7",
    "demo_3_int4_adaround/score": "6e519dd4c0de18a5",
    "demo_4_fp4dit_w4a8/capture": "e5fb761b7274f684",
    "demo_4_fp4dit_w4a8/reconstruct": "447251e3f9370ce0",
    "demo_4_fp4dit_w4a8/activate": "565b426b9edc144d",
    "demo_4_fp4dit_w4a8/generate": "fd13e30689fc529f",
    "demo_4_fp4dit_w4a8/reference": "060d500d88872191",
    "demo_4_fp4dit_w4a8/score": "2f81f5122d9cfadc",
    "demo_4_fp4dit_w4a8/export": "3c9ba7982d08e45c",
    "demo_4_fp4dit_w4a8/histograms": "97b9a0409308208a",
    "demo_5_fp4_nearest/score": "810292c8b47cc293",
    "demo_6_int4_adaround_dynamic/score": "81bba4b2e2c95e18",
    "demo_7_fp4dit_w4a6/score": "79cb331643cf6ba9",
    "demo_8_fp4dit_w4a4/score": "0ba27fe5ab7b7663",
}


@pytest.mark.parametrize(("tag", "path"), [*KINDS.items(), *STAGE_KINDS.items()])
def test_every_tag_names_code_that_exists(tag: str, path: str):
    assert callable(get_object(path))


@pytest.mark.parametrize("folder", FOLDER_KINDS.values())
def test_every_tag_of_a_folder_names_one_that_exists(folder: str):
    assert Path(resolve_package_path(folder)).is_dir()


def test_no_tag_and_no_path_is_listed_twice():
    """A tag that was listed twice in one mapping would be lost without an error."""
    assert not KINDS.keys() & STAGE_KINDS.keys()
    paths = [*KINDS.values(), *STAGE_KINDS.values()]
    assert len(set(paths)) == len(paths)


@pytest.mark.parametrize(
    "option",
    [
        *(option for option in OPTIONS if option.partition("=")[0] not in TESTED_GROUPS),
        *(f"experiment={name}" for name in DEMO),
    ],
)
def test_no_identity_contains_a_path_of_ours(composed: Compose, option: str):
    """The option composes, and every class of ours that a stage's config names has a tag.

    Options of the other groups are tested in the same way in tests/configs/test_presets.py.
    """
    config = composed(option)
    assert config.stages.score
    for name in config.stages:
        assert find_own_paths(make_identity(read_node(config, name))) == []


def read_node(config: Any, name: str) -> dict[str, Any]:
    """Resolve the parts of a stage's node that can be resolved without weights or data."""
    node = {}
    for key in config.stages[name]:
        try:
            value = config.stages[name][key]
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
            node[key] = value
        except (OmegaConfBaseException, ValueError):
            continue
    return node


def test_a_class_that_moves_keeps_its_key(monkeypatch: pytest.MonkeyPatch):
    before = make_planned_stage("capture", {}, {"_target_": STAGE_KINDS["capture_stage"]})
    monkeypatch.setitem(STAGE_KINDS, "capture_stage", "elsewhere.Capture")
    after = make_planned_stage("capture", {}, {"_target_": "elsewhere.Capture"})
    assert after.key == before.key
    assert after.config == {"_target_": "elsewhere.Capture"}


def test_a_class_without_a_tag_keeps_its_path():
    node = {"_target_": "my_package.Mine", "path": "pkg://my_package/data"}
    assert make_identity(node) == node


def collect_demo_keys() -> dict[str, str]:
    """Return the key of each row's scores, which depends on all keys before it, and one row's."""
    keys = {}
    for row in DEMO:
        stages = make_plan(compose_config("run", [f"experiment={row}"]))
        names = stages if row == DETAILED else ["score"]
        for name in names:
            keys[f"{row}/{name}"] = stages[name].key
    return keys


def test_keys_of_the_demo_are_pinned():
    """Compare with the literals above. After a change on purpose, print the new literals with

    python -m tests.pipelines.planning.test_identity
    """
    register_resolvers()
    assert collect_demo_keys() == KEYS


if __name__ == "__main__":
    register_resolvers()
    print("KEYS: dict[str, str] = {")
    for key_name, key in collect_demo_keys().items():
        print(f'    "{key_name}": "{key}",')
    print("}")
