"""Replays of captured calls continue at the step at which they were killed."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fp4dit.calibration.activations import ObserveTask, ReplayTask
from fp4dit.calibration.histograms import HistogramTask
from fp4dit.calibration.measure import MeasureTask, PredictTask
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.utils import save_timer
from pipelines.runtime.trainer import Runtime
from pipelines.stages.replay import replay_steps
from tests.calibration.test_activations import DYNAMIC, STATIC, make_states, quantize_pipeline
from tests.rounding.test_reconstruction import Killed


class Steps(Dataset):
    """Captured steps, of which those from `last` on cannot be read."""

    def __init__(self, states: list[dict[str, Tensor]], last: int) -> None:
        self.states, self.last, self.read = states, last, []

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= self.last:
            raise Killed
        self.read.append(index)
        return self.states[index]


def make_task(pipeline: PixArtAdapter, kind: type) -> ReplayTask:
    model = copy.deepcopy(pipeline)
    if kind is ObserveTask:
        return ObserveTask(model, *quantize_pipeline(model, STATIC))
    if kind is PredictTask:
        return PredictTask(model)
    activations = quantize_pipeline(model, DYNAMIC)[0]
    if kind is MeasureTask:
        latent = model.make_meta_latent(5)
        return MeasureTask(model, activations, [torch.ones(latent.shape).flatten(1)] * 4)
    return kind(model, activations)


def describe(task: ReplayTask) -> Any:
    """Return all that a task reports, to compare."""
    if isinstance(task, ObserveTask):
        task.calibrate()
        states = {name: module.state_dict() for name, module in task.activations.items()}
        return {name: {k: v.tolist() for k, v in state.items()} for name, state in states.items()}
    if isinstance(task, MeasureTask):
        return task.compute_sqnr(), task.shapes, task.compute_call_error()
    if isinstance(task, PredictTask):
        return [prediction.tolist() for prediction in task.predictions]
    assert isinstance(task, HistogramTask)
    return {name: histogram.to_dict() for name, histogram in task.histograms.items()}


@pytest.mark.parametrize("kind", [ObserveTask, PredictTask, MeasureTask, HistogramTask])
def test_a_killed_replay_continues_at_the_step(
    pipeline: PixArtAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
):
    for name in ("SHORTEST", "SAVES_PER_INTERVAL"):
        monkeypatch.setattr(save_timer, name, 0.0)
    monkeypatch.setattr(save_timer, "process_age", lambda: 0.0)
    states = [*make_states(pipeline), *make_states(pipeline)]
    for i, state in enumerate(states):
        state["latent"] = state["latent"] + 0.1 * i
    make_trainer = partial(Runtime({"accelerator": "cpu", "devices": 1}, "none").make_trainer, "")
    whole = make_task(pipeline, kind)
    replay_steps(whole, Steps(states, 4), make_trainer, tmp_path / "whole")
    with pytest.raises(Killed):
        replay_steps(make_task(pipeline, kind), Steps(states, 3), make_trainer, tmp_path / "killed")
    for last_read in ([3], []):
        resumed, steps = make_task(pipeline, kind), Steps(states, 4)
        replay_steps(resumed, steps, make_trainer, tmp_path / "killed")
        assert steps.read == last_read
        assert describe(resumed) == describe(whole)
