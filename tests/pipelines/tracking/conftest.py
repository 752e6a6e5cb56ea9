"""Fixtures of a finished job and of its W&B run."""

from pathlib import Path

import pytest

from fp4dit.store.store import Store
from pipelines.planning.executor import execute_plan
from pipelines.planning.plan import make_plan
from pipelines.runtime.trainer import Runtime
from tests.conftest import TOY, Compose
from tests.pipelines.tracking.records import Records, make_view, read_records


@pytest.fixture
def job(composed: Compose, tmp_path: Path):
    """The config, the stages and the store of a finished job."""
    config = composed(*TOY)
    stages, store = make_plan(config), Store(tmp_path / "store")
    execute_plan(stages, ["score"], store, Runtime())
    return config, stages, store


@pytest.fixture
def records(job, tmp_path: Path) -> Records:
    """The records of the job's W&B run."""
    make_view(tmp_path).show(*job)
    return read_records(tmp_path)
