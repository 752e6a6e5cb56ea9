"""A killed reconstruction repeats no finished work: units, layers, or activations between units."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp4dit.models.pixart import PixArtAdapter
from fp4dit.quantization.layers import QuantLayer
from fp4dit.rounding.base import RoundingMethod
from fp4dit.rounding.gptq import GPTQ
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.output_search import LinearGrid, OutputSearch
from fp4dit.rounding.preparation import prepare_layers
from fp4dit.rounding.rtn import RoundToNearest
from tests.helpers import tiny
from tests.rounding.test_reconstruction import (
    TRANSFORM_RULES,
    Killed,
    raise_at_unit,
    read_folder,
    reconstruct_pipeline,
)


def test_finished_units_are_not_propagated_again(loaded: PixArtAdapter, tmp_path: Path):
    whole, killed, again = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", RoundToNearest())
    with pytest.raises(Killed):
        reconstruct_pipeline(
            killed, tmp_path / "killed", raise_at_unit(RoundToNearest(), 5), save_every=0.0
        )
    names = [unit.module for unit in loaded.units()]
    counts = {name: tiny.count(again.transformer.get_submodule(name)) for name in names}
    resumed = reconstruct_pipeline(again, tmp_path / "killed", RoundToNearest(), save_every=0.0)
    assert resumed == reports
    assert [name for name in names if counts[name]] == names[4:]
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")
    for a, b in zip(whole.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(a, b)
    # Once more: all units are finished, and none is called.
    before = {name: len(count) for name, count in counts.items()}
    third = copy.deepcopy(loaded)
    assert reconstruct_pipeline(third, tmp_path / "killed", RoundToNearest()) == reports
    assert {name: len(count) for name, count in counts.items()} == before


@pytest.mark.parametrize("lost", ["unit", "file", "room"])
def test_lost_activations_are_computed_again(
    loaded: PixArtAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
):
    """An earlier unit or a part of the activations is damaged, or the disk had no room for them."""
    whole, killed, again = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", RoundToNearest())
    if lost == "room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(Killed):
        reconstruct_pipeline(
            killed, tmp_path / "killed", raise_at_unit(RoundToNearest(), 5), save_every=0.0
        )
    files = list((tmp_path / "killed" / "boundary").glob("004/*.safetensors"))
    assert len(files) == (lost != "room")
    if lost == "unit":
        next((tmp_path / "killed").glob("002_*.json")).unlink()
    if lost == "file":
        files[0].write_bytes(files[0].read_bytes()[:-1])
    assert reconstruct_pipeline(again, tmp_path / "killed", RoundToNearest()) == reports
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")


METHODS = {
    "gptq": GPTQ(),
    "search": OutputSearch(LinearGrid(count=3), rounds=1, tokens=32),
    "imatrix": ImportanceMatrix(GPTQ()),
    "layerwise": LayerwiseReconstruction(GPTQ()),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_rounded_layers_are_not_rounded_again(
    loaded: PixArtAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: RoundingMethod
):
    """The run is killed at a layer in the middle of a block, whose layers have transforms."""
    rounded: list[str] = []
    commit, last = QuantLayer.commit_weight, [-1]

    def commit_or_die(layer: QuantLayer, *args: Any) -> None:
        if len(rounded) == last[0]:
            raise Killed
        rounded.append("layer")
        commit(layer, *args)

    monkeypatch.setattr(QuantLayer, "commit_weight", commit_or_die)
    whole, killed, again = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", method, TRANSFORM_RULES)
    total = len(rounded)
    rounded.clear()
    last[0] = total // 2 + 1
    with pytest.raises(Killed):
        reconstruct_pipeline(killed, tmp_path / "killed", method, TRANSFORM_RULES, save_every=0.0)
    last[0] = -1
    resumed = reconstruct_pipeline(
        again, tmp_path / "killed", method, TRANSFORM_RULES, save_every=0.0
    )
    assert len(rounded) == total
    assert resumed == reports
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")


def test_prepared_layers_are_not_prepared_again(
    loaded: PixArtAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The run is killed when it begins to round a block whose layers have transforms."""
    prepared = []

    def note(*args: Any) -> None:
        prepared.append(1)
        prepare_layers(*args)

    monkeypatch.setattr("fp4dit.rounding.reconstruction.prepare_layers", note)
    whole, killed, again = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", GPTQ(), TRANSFORM_RULES)
    total = len(prepared)
    prepared.clear()
    with pytest.raises(Killed):
        reconstruct_pipeline(
            killed, tmp_path / "killed", raise_at_unit(GPTQ(), 4), TRANSFORM_RULES, save_every=0.0
        )
    resumed = reconstruct_pipeline(
        again, tmp_path / "killed", GPTQ(), TRANSFORM_RULES, save_every=0.0
    )
    assert len(prepared) == total
    assert resumed == reports
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")
