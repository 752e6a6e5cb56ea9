"""Settings and fixtures of all tests: one thread, no network, no W&B account."""

import copy
import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jaxtyping
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import settings
from omegaconf import DictConfig

import pipelines.run
from fp4dit.packed.nn.kernels import find_kernels
from pipelines.cli.main import run_command
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import register_resolvers

# An example may take any time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}

TOY = ["stages=toy", f"hydra.searchpath=[file://{Path(__file__).parent}/conf]"]

if TYPE_CHECKING:
    from fp4dit.models.pixart import PixArt, PixArtAdapter

Compose = Callable[..., DictConfig]
Run = Callable[..., int]
ROOT = Path(__file__).parents[1]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the garbage collector from visiting all imported modules again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes at every call, except in tests marked `unchecked`, which run whole models."""
    jaxtyping.config.update("jaxtyping_disable", item.get_closest_marker("unchecked") is not None)


@pytest.fixture
def composed(tmp_path: Path) -> Compose:
    """A function that composes conf/run.yaml, with its outputs under tmp_path."""
    register_resolvers()
    return lambda *overrides: compose_config("run", [*overrides, f"outputs={tmp_path}"])


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Turn compiled kernels off, so that packed layers equal the simulation to the bit."""
    monkeypatch.setenv("FP4DIT_KERNEL", "none")
    find_kernels.cache_clear()
    yield
    find_kernels.cache_clear()


def call_command(main: Callable, *arguments: str) -> int:
    """Run a command in this process as in the root of the checkout, and return its exit code."""
    GlobalHydra.instance().clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        patch.setattr(sys, "argv", ["command", *arguments])
        try:
            run_command(main)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
                return 1
            return stop.code or 0
        return 0


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A function that runs a command in this process, and returns its exit code."""
    monkeypatch.chdir(ROOT)

    def call(*arguments: str, main: Callable = pipelines.run.main, outputs: bool = True) -> int:
        return call_command(main, *arguments, *([f"outputs={tmp_path}"] if outputs else []))

    return call


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that has the identity of a diffusers pipeline, but no usable weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "weights.safetensors").write_bytes(b"first")
    return folder


@pytest.fixture(scope="session")
def pixart_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random PixArt in the layout of diffusers."""
    from tests.helpers import (
        tiny,  # imported here because most tests of orchestration need no torch
    )

    folder = tmp_path_factory.mktemp("pixart")
    tiny.save(folder)
    return folder


@pytest.fixture
def source(pixart_folder: Path) -> "PixArt":
    from fp4dit.models.pixart import PixArt

    return PixArt(str(pixart_folder), tokens=20)


@pytest.fixture(scope="session")
def loaded(pixart_folder: Path) -> "PixArtAdapter":
    from fp4dit.models.pixart import PixArt

    return PixArt(str(pixart_folder), tokens=20).load()


@pytest.fixture
def pipeline(loaded: "PixArtAdapter") -> "PixArtAdapter":
    """A copy of the tiny PixArt, which a test may quantize."""
    return copy.deepcopy(loaded)
