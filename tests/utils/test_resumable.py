"""A killed fit resumes from its last checkpoint, and ends with the same bits."""

import copy
import logging
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.optim import Optimizer

from fp4dit.calibration.dataset import UnitBatches, UnitDataset
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.rounding.adaround import adaround_scale_aware
from fp4dit.rounding.base import Curve, RoundingMethod
from fp4dit.rounding.layerwise import LayerwiseReconstruction
from fp4dit.rounding.learned import LearnedRounding
from fp4dit.rounding.learned_range import round_scale_to_format
from fp4dit.rounding.signround import SignRound, SignSGD, linear_decay
from fp4dit.utils import save_timer
from fp4dit.utils.resumable import ResumableTrainers
from tests.helpers import tiny
from tests.rounding.test_reconstruction import (
    Killed,
    make_two_layers,
    read_folder,
    reconstruct_pipeline,
)

STEPS = 10
ADAROUND = tiny.learned_rounding(adaround_scale_aware, steps=STEPS)
SIGNROUND = replace(
    tiny.learned_rounding(
        partial(SignRound, scale_rounding=round_scale_to_format), steps=STEPS, keep_best=True
    ),
    optimizer=partial(SignSGD, lr=0.05),
    schedule=partial(linear_decay, steps=STEPS),
)
CASES = {
    "adaround": (ADAROUND, lambda plan: plan),
    "bf16": (replace(ADAROUND, precision="bf16-mixed"), lambda plan: plan),
    "signround": (SIGNROUND, lambda plan: plan),
    "layerwise": (replace(ADAROUND, steps=STEPS // 2), LayerwiseReconstruction),  # of two layers
}


def kill() -> NoReturn:
    raise Killed


def counted(
    plan: LearnedRounding, steps: list[int], last: int = 0, end: Callable[[], None] = kill
) -> LearnedRounding:
    """Notes its steps, and ends right after the last one that it may do."""

    def note(*_: Any) -> None:
        steps.append(1)
        if len(steps) == last:
            end()

    def optimizer(parameters: Any) -> Optimizer:
        made = plan.optimizer(parameters)
        made.register_step_post_hook(note)
        return made

    return replace(plan, optimizer=optimizer)


def fitted(
    fit: RoundingMethod, trainers: ResumableTrainers, factor: float = 1.0
) -> tuple[dict[str, Tensor], Curve]:
    """All that is left of a fit: weights, scales, transforms; and the curve."""
    module, layers, examples = make_two_layers()
    examples = replace(examples, inputs={"x": factor * examples.inputs["x"]})
    curve = fit.round_unit(module, layers, examples, trainers)
    return {
        f"{i}.{name}": v for i, layer in enumerate(layers) for name, v in layer.state_dict().items()
    }, curve


def same(a: tuple[dict[str, Tensor], Curve], b: tuple[dict[str, Tensor], Curve]) -> bool:
    return (
        a[0].keys() == b[0].keys()
        and all(torch.equal(a[0][name], b[0][name]) for name in a[0])
        and a[1] == b[1]
    )


def keeping(folder: Path, seconds: float = 0.0) -> ResumableTrainers:
    return replace(tiny.trainer(), folder=folder, seconds=seconds)


@pytest.mark.parametrize(("plan", "around"), CASES.values(), ids=CASES)
def test_an_interrupted_fit_ends_with_the_same_bits(
    plan: LearnedRounding, around: Callable, tmp_path: Path
):
    whole = fitted(around(plan), tiny.trainer())
    for last in (4, 9):
        trainers, first, again = keeping(tmp_path / str(last)), [], []
        with pytest.raises(Killed):
            fitted(around(counted(plan, first, last)), trainers)
        assert same(fitted(around(counted(plan, again)), trainers), whole)
        assert len(first) == last
        assert len(again) == STEPS - (last - 1)  # the last one had not been kept
        assert same(
            fitted(around(counted(plan, again, 1)), trainers), whole
        )  # it was, with the last step of all


def test_the_best_step_may_lie_before_the_checkpoint(tmp_path: Path):
    """Ever longer steps lead away from where the first ones led."""
    plan = replace(
        SIGNROUND, schedule=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.5**step)
    )
    best, last = (
        fitted(plan, tiny.trainer()),
        fitted(replace(plan, keep_best=False), tiny.trainer()),
    )
    assert not same(best, last)
    errors = [point["error"] for point in best[1]]
    assert errors.index(min(errors)) < 8
    with pytest.raises(Killed):
        fitted(counted(plan, [], 9), keeping(tmp_path))
    assert same(fitted(plan, keeping(tmp_path)), best)


def test_a_killed_process_leaves_what_it_kept(tmp_path: Path):
    child = os.fork()
    if child == 0:
        try:
            fitted(
                counted(ADAROUND, [], 6, lambda: os.kill(os.getpid(), signal.SIGKILL)),
                keeping(tmp_path),
            )
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    again = []
    assert same(
        fitted(counted(ADAROUND, again), keeping(tmp_path)), fitted(ADAROUND, tiny.trainer())
    )
    assert len(again) == STEPS - 5


def test_a_killed_reconstruction_resumes_within_the_unit(loaded: PixArtAdapter, tmp_path: Path):
    plan, again = tiny.learned_rounding(adaround_scale_aware, steps=6), []
    whole, killed, resumed = (copy.deepcopy(loaded) for _ in range(3))
    reports = reconstruct_pipeline(whole, tmp_path / "whole", plan)
    with pytest.raises(Killed):
        reconstruct_pipeline(
            killed, tmp_path / "resumed", counted(plan, [], 3 * 6 + 4), save_every=0.0
        )
    assert [path.name for path in (tmp_path / "resumed").glob("*.resume")] == [
        "004_transformer_blocks.0.resume"
    ]
    assert (
        reconstruct_pipeline(resumed, tmp_path / "resumed", counted(plan, again), save_every=0.0)
        == reports
    )
    assert len(again) == 6 * len(loaded.units()) - (3 * 6 + 3)
    assert read_folder(tmp_path / "resumed") == read_folder(tmp_path / "whole")


def cut(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("case", ["adaround", "layerwise"])
def test_what_is_of_no_use_is_told_and_left(case: str, tmp_path: Path, caplog: Any):
    (plan, around), again = CASES[case], []
    with pytest.raises(Killed):
        fitted(around(counted(plan, [], 8)), keeping(tmp_path))
    cut(tmp_path)
    with caplog.at_level(logging.WARNING, "fp4dit"):
        assert same(
            fitted(around(counted(plan, again)), keeping(tmp_path)),
            fitted(around(plan), tiny.trainer()),
        )
    assert len(again) == STEPS
    assert "begins again" in caplog.text


def test_nothing_is_kept_of_what_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(save_timer, "process_age", lambda: float("inf"))
    fitted(ADAROUND, keeping(tmp_path / "one", seconds=float("inf")))
    fitted(LayerwiseReconstruction(ADAROUND), keeping(tmp_path / "two", seconds=float("inf")))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_starts_quickly_saves_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first checkpoint does not wait for the longest interval."""
    monkeypatch.setattr(save_timer, "process_age", lambda: 0.0)
    monkeypatch.setattr(save_timer, "SHORTEST", 0.0)
    fitted(ADAROUND, keeping(tmp_path, seconds=float("inf")))
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors"]


@pytest.mark.parametrize("case", ["adaround", "layerwise"])
def test_a_disk_that_takes_nothing_stops_nothing(case: str, tmp_path: Path, caplog: Any):
    plan, around = CASES[case]
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING, "fp4dit"):
        assert same(
            fitted(around(plan), keeping(tmp_path / "file")), fitted(around(plan), tiny.trainer())
        )
    assert "could not write" in caplog.text


def test_no_pickle_and_not_the_unit_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("pickle")

    for module, name in [(torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads")]:
        monkeypatch.setattr(module, name, refuse)
    for _ in range(2):
        fitted(SIGNROUND, keeping(tmp_path))
    [path] = (path for path in tmp_path.rglob("*") if path.is_file())
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        size = sum(file.get_tensor(name).numel() for name in names)
    weights = 32 * 32 + 32 * 16
    assert {name.split("/")[1] for name in names} == {"state_dict", "progress"}
    assert (
        size == 2 * (weights + 2 * weights / 32) + 2
    )  # of the last and the best step; nearest's error and the least


def test_batches_that_are_skipped_are_not_read():
    class Noted:
        read = 0
        shape = torch.Size([10])

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: Tensor) -> Tensor:
            self.read += 1
            return index

    column = Noted()
    unit = make_two_layers()[2].unit
    examples = UnitDataset(unit, {"x": column}, {"y": column}, torch.arange(10))

    def some(skip: int, count: int) -> list[list[int]]:
        batches = UnitBatches(examples, 4, seed=1, num_skipped=skip).iter_batches()
        return [next(batches).rows["x"].tolist() for _ in range(count)]

    all_of_them, column.read = some(0, 12), 0
    assert some(7, 5) == all_of_them[7:]
    assert column.read == 2 * 5
