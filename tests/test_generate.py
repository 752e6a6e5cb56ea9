"""Generated images depend on their prompt, seed and chunk alone."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fp4dit.models.pixart import PixArtPipeline
from fp4dit.tasks.capture import Chunk, chunked
from fp4dit.tasks.generate import GenerateTask, files
from pipelines.parted import Parts, one_by_one
from tests import tiny


def generate(pipeline: PixArtPipeline, out: Path, prompts: list[str], chunk: int = 2) -> dict[str, bytes]:
    out.mkdir(exist_ok=True)
    task = GenerateTask(pipeline, out, steps=2, guidance=4.5)
    items = chunked(prompts, chunk, seed=42)
    parts = Parts(items, [files(out, item) for item in items], out, "", patient=True)
    tiny.trainer()().predict(task, one_by_one(parts))
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.png"))}


def test_chunks_keep_order_and_seeds():
    assert chunked(["a", "b", "c"], 2, 42) == [Chunk(0, ["a", "b"], [42, 43]), Chunk(2, ["c"], [44])]
    seeds = [s for chunk in chunked(list("abcdefg"), 3, 10) for s in chunk.seeds]
    assert seeds == [s for chunk in chunked(list("abcdefg"), 7, 10) for s in chunk.seeds] == list(range(10, 17))


def test_images_do_not_depend_on_what_else_is_generated(pipeline: PixArtPipeline, tmp_path: Path):
    two = generate(pipeline, tmp_path / "two", tiny.PROMPTS[:2])
    four = generate(pipeline, tmp_path / "four", tiny.PROMPTS)
    assert list(four) == [f"{i:05}.png" for i in range(4)]
    assert {name: four[name] for name in two} == two
    assert len(set(four.values())) == 4
    with Image.open(tmp_path / "four" / "00003.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_resuming_keeps_finished_chunks_and_remakes_the_rest(pipeline: PixArtPipeline, tmp_path: Path):
    whole = generate(pipeline, tmp_path, tiny.PROMPTS)
    (tmp_path / "00003.png").unlink()
    (tmp_path / "00003.png.1.part").write_bytes(b"half an image")
    (tmp_path / "00000.png").write_bytes(b"kept as it is")
    seen = tiny.count(pipeline.dit.transformer_blocks[0])
    resumed = generate(pipeline, tmp_path, tiny.PROMPTS)
    assert sum(seen) == 2 * 2 * 2  # one chunk of 2, twice for guidance, 2 steps
    assert resumed == whole | {"00000.png": b"kept as it is"}


def test_the_noise_comes_from_the_seed_alone(pipeline: PixArtPipeline):
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
def test_guidance_asks_twice(pipeline: PixArtPipeline, guidance: float):
    seen = tiny.count(pipeline.dit.transformer_blocks[0])
    pipeline.sample(tiny.PROMPTS[:2], [0, 1], 3, guidance)
    assert sum(seen) == 3 * 2 * (2 if guidance > 1 else 1)
