"""Test the scores of images: shards, errors that name an image, and the summary."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fp4dit.evaluation import summary
from fp4dit.evaluation.score import ScoreTask, list_score_files, load_shards, make_shards
from fp4dit.metrics.base import PerImageMetric
from fp4dit.metrics.clip import CLIPScore
from fp4dit.metrics.flicker import Flicker
from fp4dit.metrics.full_reference import PSNR, SSIM
from fp4dit.utils import save_timer
from fp4dit.utils.errors import UserError
from fp4dit.utils.images import read_image, save_image
from pipelines.runtime.trainer import Runtime
from pipelines.stages.sharded import ShardQueue, load_one_by_one

COUNT = 70  # more than a shard


class Brightness(PerImageMetric):
    """A metric that is NaN for a black image."""

    about = "Mean, or NaN if it is 0"

    def score(self, images, reference, prompts):
        mean = images.mean((1, 2, 3))
        return torch.where(mean > 0, mean, mean / mean)


def write_images(folder: Path, image: Callable[[int], torch.Tensor], count: int = COUNT) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = image(i).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:05}.png")
    return folder


def read_images(folder: Path) -> torch.Tensor:
    return torch.stack([read_image(path) for path in sorted(folder.iterdir())])


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    random = torch.Generator().manual_seed(0)

    def make_noise(i: int) -> torch.Tensor:
        return torch.rand(3, 16, 16, generator=random) * 0.2 + 0.01 * i

    return write_images(root / "images", make_noise), write_images(root / "reference", make_noise)


@pytest.fixture
def writable_folders(folders, tmp_path) -> tuple[Path, Path]:
    """Return copies of the folders, whose files a test may change."""
    for folder in folders:
        (tmp_path / folder.name).mkdir()
        for path in folder.iterdir():
            (tmp_path / folder.name / path.name).symlink_to(path)
    return tmp_path / "images", tmp_path / "reference"


def score_images(
    metrics, folders, out: Path, prompts: int = COUNT, **devices
) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    task = ScoreTask(*summary.split_metrics(metrics), out)
    shards = make_shards(*folders, [f"prompt {i}" for i in range(prompts)])
    files = [list_score_files(out, shard) for shard in shards]
    queue = ShardQueue(shards, files, out, "", wait_for_others=True)
    runtime = Runtime({"accelerator": "cpu", "devices": 1, **devices}, "none")
    trainer = runtime.make_trainer("score")
    try:
        trainer.predict(task, load_one_by_one(queue), return_predictions=False)
    finally:
        queue.close()
    return load_shards(out)


def test_scores_are_those_of_the_metrics(folders, tmp_path):
    """Scores are in the order of the images."""
    scores = score_images({"psnr": PSNR(), "ssim": SSIM()}, folders, tmp_path / "out")
    images, reference = (read_images(folder) for folder in folders)
    torch.testing.assert_close(scores["psnr"], PSNR().score(images, reference, []))
    torch.testing.assert_close(scores["ssim"], SSIM().score(images, reference, []))


def test_two_processes_write_the_files_of_one(folders, tmp_path):
    def make_metrics() -> dict[str, PerImageMetric]:
        return {"psnr": PSNR(), "clip": CLIPScore("pkg://fp4dit/worlds/shapes/weights/clip")}

    one = score_images(make_metrics(), folders, tmp_path / "one")
    two = score_images(make_metrics(), folders, tmp_path / "two", devices=2, strategy="ddp_spawn")
    assert read_folder(tmp_path / "one") == read_folder(tmp_path / "two")
    assert torch.equal(one["psnr"], two["psnr"])
    assert torch.equal(one["clip"], two["clip"])


def test_a_killed_shard_continues_at_the_batch(folders, tmp_path, monkeypatch):
    """The run is killed at the third of five batches, of which four are in the first shard."""
    for name in ("SHORTEST", "SAVES_PER_INTERVAL"):
        monkeypatch.setattr(save_timer, name, 0.0)
    monkeypatch.setattr(save_timer, "process_age", lambda: 0.0)
    scored = []

    class Mortal(PSNR):
        def score(self, images, reference, prompts):
            scored.append(len(images))
            if len(scored) == 3:
                raise KeyError("killed")
            return super().score(images, reference, prompts)

    score_images({"psnr": PSNR()}, folders, tmp_path / "whole")
    with pytest.raises(KeyError, match="killed"):
        score_images({"psnr": Mortal()}, folders, tmp_path / "killed")
    score_images({"psnr": Mortal()}, folders, tmp_path / "killed")
    assert scored == [16, 16, 16, 16, 16, 6]
    assert read_folder(tmp_path / "killed") == read_folder(tmp_path / "whole")


def test_a_finished_shard_is_not_scored_again(folders, tmp_path):
    first = score_images({"psnr": PSNR()}, folders, tmp_path / "out")
    (tmp_path / "out" / "00064.safetensors").unlink()
    finished = tmp_path / "out" / "00000.safetensors"
    modified = finished.stat().st_mtime_ns
    again = score_images({"psnr": PSNR()}, folders, tmp_path / "out")
    assert finished.stat().st_mtime_ns == modified
    assert torch.equal(first["psnr"], again["psnr"])


def test_a_broken_image_is_named(writable_folders, tmp_path):
    """The error names the image, and the shards before it are kept."""
    broken = writable_folders[0] / "00066.png"
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00066\.png is no image .*run again"):
        score_images({"psnr": PSNR()}, writable_folders, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["00000.safetensors"]


def test_a_nan_score_is_refused(writable_folders, tmp_path):
    """The error names the image and the metric."""
    (writable_folders[0] / "00003.png").unlink()
    Image.new("RGB", (16, 16)).save(writable_folders[0] / "00003.png")
    with pytest.raises(UserError, match=r"dark has no number for .*00003\.png \('prompt 3'\)"):
        score_images({"dark": Brightness()}, writable_folders, tmp_path / "out")


def test_images_prompts_and_references_have_to_match(writable_folders, tmp_path):
    with pytest.raises(UserError, match="holds 70 images for 69 prompts"):
        score_images({}, writable_folders, tmp_path / "out", prompts=69)
    (writable_folders[1] / "00005.png").unlink()
    with pytest.raises(UserError, match=r"has no 00005\.png \(1 missing in all\)"):
        score_images({}, writable_folders, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 images for 0 prompts"):
        score_images({}, (tmp_path / "empty", writable_folders[1]), tmp_path / "out", prompts=0)


def test_images_and_references_have_the_same_size(writable_folders, tmp_path):
    (writable_folders[0] / "00000.png").unlink()
    Image.new("RGB", (16, 17)).save(writable_folders[0] / "00000.png")
    with pytest.raises(UserError, match=r"different sizes: \(16, 16\), \(17, 16\)"):
        score_images({"psnr": PSNR()}, writable_folders, tmp_path / "out")


def test_videos_are_scored_one_after_the_other(tmp_path):
    """A batch has few frames, and the values are those of whole videos."""
    videos = {}
    for name in ("images", "reference"):
        (tmp_path / name).mkdir()
        videos[name] = torch.randint(256, (3, 9, 3, 16, 16)) / 255
        for i, video in enumerate(videos[name]):
            save_image(video, tmp_path / name / f"{i:05}.png")
    folders = (tmp_path / "images", tmp_path / "reference")
    [shard] = make_shards(*folders, ["a", "b", "c"])
    assert [tuple(images.shape[:2]) for images, _, _ in shard.load_batches()] == [(1, 9)] * 3
    scores = score_images({"flicker": Flicker(), "psnr": PSNR()}, folders, tmp_path / "out", 3)
    expected = Flicker().score(videos["images"], videos["reference"], [])
    torch.testing.assert_close(scores["flicker"], expected)
    save_image(videos["images"][0, :5], tmp_path / "images" / "00000.png")
    with pytest.raises(UserError, match=r"different numbers of frames: \[5, 9\]"):
        score_images({"psnr": PSNR()}, folders, tmp_path / "again", 3)


def test_the_summary_has_means_groups_and_values(tmp_path):
    images = []
    for i in range(4):
        images.append({"prompt": str(i), "seed": i, "group": "photo" if i % 2 else "anime"})
    result = summary.summarize_scores(
        {"psnr": PSNR()}, {"psnr": torch.tensor([1.0, 2.0, 3.0, 6.0])}, images
    )
    assert result["n"] == 4
    assert result["metrics"]["psnr"]["mean"] == 3
    groups = result["groups"]["psnr"]
    assert (groups["anime"]["mean"], groups["photo"]["mean"]) == (2, 4)
    assert result["per_image"] == {"psnr": [1, 2, 3, 6]}
    assert "ratio" in result["about"]["psnr"]
    json.dumps(result, allow_nan=False)


def test_an_infinite_score_has_no_mean():
    result = summary.summarize_scores(
        {"psnr": PSNR()}, {"psnr": torch.tensor([1.0, torch.inf])}, [{"prompt": ""}] * 2
    )
    assert result["metrics"]["psnr"] is None
    assert result["per_image"]["psnr"] == [1, None]
