"""Test the measured effect of an error at each denoising step."""

import pytest
import torch

from benchmarks import step_sensitivity
from benchmarks.step_sensitivity import measure_step_sensitivity, perturb_step
from fp4dit.models.pixart import PixArtAdapter
from tests.helpers import tiny


def test_sensitivity_is_a_ratio_that_does_not_depend_on_the_noise(
    pipeline: PixArtAdapter, monkeypatch: pytest.MonkeyPatch
):
    measured = []
    for size in (0.01, 0.005):
        monkeypatch.setattr(step_sensitivity, "SIZE", size)
        measured.append(measure_step_sensitivity(pipeline, tiny.PROMPTS[:2], [0, 1], 3, 1.0))
    first, second = measured
    assert list(first) == pipeline.pipe.scheduler.timesteps.tolist()
    assert sum(first.values()) == pytest.approx(3)
    assert list(second.values()) == pytest.approx(list(first.values()), rel=0.1)


def test_noise_is_added_to_one_call_only(pipeline: PixArtAdapter):
    answers: list[torch.Tensor] = []
    for step in (None, 1):
        with perturb_step(pipeline.transformer, 99 if step is None else step):
            hook = pipeline.transformer.register_forward_hook(
                lambda _m, _args, output: answers.append(output[0])
            )
            pipeline.sample(tiny.PROMPTS[:1], [0], 2, 1.0)
            hook.remove()
    assert answers[0].equal(answers[2])
    relative = (answers[3] - answers[1]).norm() / answers[1].norm()
    assert relative.item() == pytest.approx(step_sensitivity.SIZE, rel=0.2)
