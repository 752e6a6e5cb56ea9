"""Test which layers a step cache computes, and what images it leaves as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fp4dit.calibration.capture import batch_prompts
from fp4dit.evaluation import FirstBlockCache, GenerateTask, LayerOutputCache, StepCache
from fp4dit.evaluation.step_cache import start_caches
from fp4dit.models.pixart import PixArtAdapter
from fp4dit.utils.errors import UserError
from pipelines.stages.sharded import load_one_by_one
from tests.helpers import tiny

STEPS = 8


def draw_counted(
    pipeline: PixArtAdapter, cache: StepCache | None, steps: int = STEPS
) -> tuple[torch.Tensor, int, int]:
    """Return an image, and how often the first and the last feed-forward layer were computed."""
    blocks = pipeline.transformer.transformer_blocks
    first, last = (tiny.count(block.ff.net[-1]) for block in (blocks[0], blocks[-1]))
    if cache is not None:
        cache.apply_(pipeline.transformer)
    with start_caches([pipeline.transformer], steps):
        image = pipeline.sample(tiny.PROMPTS[:1], [7], STEPS, 4.5)
    return image, len(first), len(last)


@pytest.mark.parametrize(
    ("cache", "expected"),
    [
        (None, (8, 8)),
        (FirstBlockCache(1e-9), (8, 8)),
        (FirstBlockCache(1e9), (8, 1)),
        (LayerOutputCache(interval=2, first=3), (5, 5)),  # steps 0, 1, 2, 4, 6
        (LayerOutputCache(interval=4, order=1, first=2), (4, 4)),
    ],
)
def test_layers_are_computed_as_often_as_the_cache_says(
    pipeline: PixArtAdapter, cache: StepCache | None, expected: tuple[int, int]
):
    assert draw_counted(pipeline, cache)[1:] == expected


def test_a_cache_that_skips_nothing_changes_no_bit(pipeline: PixArtAdapter):
    plain = draw_counted(pipeline, None)[0]
    assert draw_counted(pipeline, FirstBlockCache(1e-9))[0].equal(plain)


def test_reused_outputs_are_those_of_the_last_computed_step(pipeline: PixArtAdapter):
    layer = pipeline.transformer.transformer_blocks[0].ff
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    draw_counted(pipeline, LayerOutputCache(interval=2, first=3))
    repeated = [i for i in range(1, STEPS) if seen[i].equal(seen[i - 1])]
    assert repeated == [3, 5, 7]


def test_batches_do_not_share_a_cache(pipeline: PixArtAdapter, tmp_path: Path):
    """Draw an image after another one, and then alone."""
    task = GenerateTask(pipeline, tmp_path, steps=4, guidance=4.5, cache=FirstBlockCache(1e9))
    batches = batch_prompts(tiny.PROMPTS[:2], 1, seed=0)
    tiny.trainer()().predict(task, load_one_by_one(batches))
    with start_caches([pipeline.transformer], 4):
        alone = pipeline.sample(batches[1].prompts, batches[1].seeds, 4, 4.5)
    with Image.open(tmp_path / "00001.png") as image:
        after = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert after.equal((alone[0] * 255).byte())


def test_useless_and_impossible_caches_are_refused(pipeline: PixArtAdapter):
    with pytest.raises(UserError, match="step_cache=null"):
        FirstBlockCache(0.0)
    with pytest.raises(UserError, match="more first steps"):
        LayerOutputCache(order=3, first=3)
    with pytest.raises(UserError, match="name its attention"):
        LayerOutputCache(layers=["no_such_layer"]).apply_(pipeline.transformer)
    with pytest.raises(UserError, match="step_cache=layer_outputs"):
        FirstBlockCache().apply_(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(UserError, match="more than once in a step"):
        draw_counted(pipeline, None, steps=STEPS - 1)
