"""Test that images depend on their prompt, seed and batch size only."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fp4dit.calibration.capture import PromptBatch, batch_prompts
from fp4dit.evaluation.generate import GenerateTask, list_image_files
from fp4dit.models.pixart import PixArtAdapter
from pipelines.stages.sharded import ShardQueue, load_one_by_one
from tests.helpers import tiny


def generate_images(
    pipeline: PixArtAdapter, out: Path, prompts: list[str], batch_size: int = 2
) -> dict[str, bytes]:
    out.mkdir(exist_ok=True)
    task = GenerateTask(pipeline, out, steps=2, guidance=4.5)
    batches = batch_prompts(prompts, batch_size, seed=42)
    files = [list_image_files(out, batch) for batch in batches]
    queue = ShardQueue(batches, files, out, "", wait_for_others=True)
    tiny.trainer()().predict(task, load_one_by_one(queue))
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_prompts_are_batched_in_order_with_seeds():
    assert batch_prompts(["a", "b", "c"], 2, 42) == [
        PromptBatch(0, ["a", "b"], [42, 43]),
        PromptBatch(2, ["c"], [44]),
    ]
    for size in (3, 7):
        seeds = []
        for batch in batch_prompts(list("abcdefg"), size, 10):
            seeds += batch.seeds
        assert seeds == list(range(10, 17))


def test_images_do_not_depend_on_other_prompts(pipeline: PixArtAdapter, tmp_path: Path):
    two = generate_images(pipeline, tmp_path / "two", tiny.PROMPTS[:2])
    four = generate_images(pipeline, tmp_path / "four", tiny.PROMPTS)
    assert list(four) == [f"{i:05}.png" for i in range(4)]
    assert {name: four[name] for name in two} == two
    assert len(set(four.values())) == 4
    with Image.open(tmp_path / "four" / "00003.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_resuming_keeps_finished_batches(pipeline: PixArtAdapter, tmp_path: Path):
    whole = generate_images(pipeline, tmp_path, tiny.PROMPTS)
    (tmp_path / "00003.png").unlink()
    (tmp_path / "00003.png.1.part").write_bytes(b"half an image")
    (tmp_path / "00000.png").write_bytes(b"finished image")
    batch_sizes = tiny.count(pipeline.transformer.transformer_blocks[0])
    resumed = generate_images(pipeline, tmp_path, tiny.PROMPTS)
    assert sum(batch_sizes) == 2 * 2 * 2  # a batch of 2, twice for guidance, in 2 steps
    assert resumed == whole | {"00000.png": b"finished image"}


def test_the_noise_depends_on_the_seed_only(pipeline: PixArtAdapter):
    torch.manual_seed(1)
    first = pipeline.sample(tiny.PROMPTS[:1], [7], 2, 4.5)
    torch.manual_seed(2)
    assert torch.equal(pipeline.sample(tiny.PROMPTS[:1], [7], 2, 4.5), first)
    assert not torch.equal(pipeline.sample(tiny.PROMPTS[:1], [8], 2, 4.5), first)
    together = pipeline.sample([tiny.PROMPTS[1], tiny.PROMPTS[0]], [3, 7], 2, 4.5)[1:]
    torch.testing.assert_close(together, first, rtol=1e-3, atol=1e-3)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_guidance_doubles_the_passes(pipeline: PixArtAdapter, guidance: float):
    batch_sizes = tiny.count(pipeline.transformer.transformer_blocks[0])
    pipeline.sample(tiny.PROMPTS[:2], [0, 1], 3, guidance)
    assert sum(batch_sizes) == 3 * 2 * (2 if guidance > 1 else 1)
