"""Fixtures that run a test once for each model family."""

import copy
from pathlib import Path

import pytest

from fp4dit.models.base import Pipeline, PipelineSource
from tests.helpers import tiny
from tests.helpers.model_families import FAMILIES


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """The name of a model family."""
    return request.param


@pytest.fixture(scope="module")
def family_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny replica of the family."""
    folder = tmp_path_factory.mktemp(family)
    FAMILIES[family].save(folder)
    return folder


@pytest.fixture(scope="module")
def family_source(family: str, family_folder: Path) -> PipelineSource:
    return FAMILIES[family].make_source(str(family_folder))


@pytest.fixture(scope="module")
def loaded_family(family_source: PipelineSource) -> Pipeline:
    """The replica, which tests do not change."""
    return family_source.load()


@pytest.fixture
def family_pipeline(loaded_family: Pipeline) -> Pipeline:
    """A copy of the replica, which tests may change."""
    return copy.deepcopy(loaded_family)


@pytest.fixture
def prompts(family: str) -> list[str]:
    """Prompts that the family can draw."""
    return tiny.CLASSES if family == "dit" else tiny.PROMPTS
