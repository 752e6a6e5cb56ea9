"""The score stage's task: shards that are kept, whatever goes wrong with one image."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from fp4dit import scores
from fp4dit.errors import UserError
from fp4dit.metrics.base import PerImage
from fp4dit.metrics.clip import ClipScore
from fp4dit.metrics.psnr import Psnr
from fp4dit.metrics.ssim import Ssim
from fp4dit.tasks import score
from fp4dit.tasks.score import ScoreTask, gathered, shards
from pipelines.parted import Parts, one_by_one
from pipelines.runtime import Runtime

COUNT = 70  # more than a shard


class Brightness(PerImage):
    """No number for an image that is all black."""

    about = "Mean, divided by itself where that is nothing"

    def score(self, images, reference, prompts):
        mean = images.mean((1, 2, 3))
        return torch.where(mean > 0, mean, mean / mean)


def draw(folder: Path, image: Callable[[int], torch.Tensor], count: int = COUNT) -> Path:
    folder.mkdir()
    for i in range(count):
        pixels = image(i).mul(255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:05}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    random = torch.Generator().manual_seed(0)
    noise = lambda i: torch.rand(3, 16, 16, generator=random) * 0.2 + 0.01 * i
    return draw(root / "images", noise), draw(root / "reference", noise)


@pytest.fixture
def copied(folders, tmp_path) -> tuple[Path, Path]:
    """Folders that a test may spoil."""
    for folder in folders:
        (tmp_path / folder.name).mkdir()
        for path in folder.iterdir():
            (tmp_path / folder.name / path.name).symlink_to(path)
    return tmp_path / "images", tmp_path / "reference"


def run(metrics, folders, out: Path, prompts: int = COUNT, **devices) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    task = ScoreTask(*scores.split(metrics), out)
    items = shards(*folders, [f"prompt {i}" for i in range(prompts)])
    parts = Parts(items, [score.files(out, shard) for shard in items], out, "", patient=True)
    runtime = Runtime({"accelerator": "cpu", "devices": 1, **devices}, "none")
    runtime.trainer("score").predict(task, one_by_one(parts), return_predictions=False)
    return gathered(out)


def test_scores_are_those_of_the_metric_alone_in_the_order_of_the_images(folders, tmp_path):
    found = run({"psnr": Psnr(), "ssim": Ssim()}, folders, tmp_path / "out")
    images, reference = (torch.stack([score.read(p) for p in sorted(folder.iterdir())]) for folder in folders)
    torch.testing.assert_close(found["psnr"], Psnr().score(images, reference, []))
    torch.testing.assert_close(found["ssim"], Ssim().score(images, reference, []))


def test_two_processes_say_the_same_as_one(folders, tmp_path):
    metrics = lambda: {"psnr": Psnr(), "clip": ClipScore("pkg://fp4dit.models.shapes/weights/clip")}
    one = run(metrics(), folders, tmp_path / "one")
    two = run(metrics(), folders, tmp_path / "two", devices=2, strategy="ddp_spawn")
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()
    }
    assert torch.equal(one["psnr"], two["psnr"])
    assert torch.equal(one["clip"], two["clip"])


def test_a_shard_that_is_there_is_not_scored_again(folders, tmp_path):
    first = run({"psnr": Psnr()}, folders, tmp_path / "out")
    (tmp_path / "out" / "00064.safetensors").unlink()
    kept = (tmp_path / "out" / "00000.safetensors").stat().st_mtime_ns
    again = run({"psnr": Psnr()}, folders, tmp_path / "out")
    assert (tmp_path / "out" / "00000.safetensors").stat().st_mtime_ns == kept
    assert torch.equal(first["psnr"], again["psnr"])


def test_a_broken_image_is_named_and_the_shards_before_it_are_kept(copied, tmp_path):
    broken = copied[0] / "00066.png"
    content = broken.read_bytes()
    broken.unlink()
    broken.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"00066\.png is no image .*run again"):
        run({"psnr": Psnr()}, copied, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["00000.safetensors"]


def test_a_score_that_is_no_number_is_refused_by_image_and_metric(copied, tmp_path):
    (copied[0] / "00003.png").unlink()
    Image.new("RGB", (16, 16)).save(copied[0] / "00003.png")
    with pytest.raises(UserError, match=r"dark has no number for .*00003\.png \('prompt 3'\)"):
        run({"dark": Brightness()}, copied, tmp_path / "out")


def test_images_prompts_and_references_have_to_match(copied, tmp_path):
    with pytest.raises(UserError, match="holds 70 images for 69 prompts"):
        run({}, copied, tmp_path / "out", prompts=69)
    (copied[1] / "00005.png").unlink()
    with pytest.raises(UserError, match=r"has no 00005\.png \(1 missing in all\)"):
        run({}, copied, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 images for 0 prompts"):
        run({}, (tmp_path / "empty", copied[1]), tmp_path / "out", prompts=0)


def test_images_of_another_size_than_their_references_are_refused(copied, tmp_path):
    (copied[0] / "00000.png").unlink()
    Image.new("RGB", (16, 17)).save(copied[0] / "00000.png")
    with pytest.raises(UserError, match=r"different sizes: \(16, 16\), \(17, 16\)"):
        run({"psnr": Psnr()}, copied, tmp_path / "out")


def test_the_report_holds_means_groups_and_values(tmp_path):
    drawn = [{"prompt": str(i), "seed": i, "group": "photo" if i % 2 else "anime"} for i in range(4)]
    report = scores.report({"psnr": Psnr()}, {"psnr": torch.tensor([1.0, 2.0, 3.0, 6.0])}, drawn)
    assert report["n"] == 4
    assert report["metrics"]["psnr"]["mean"] == 3
    assert {name: group["mean"] for name, group in report["groups"]["psnr"].items()} == {"anime": 2, "photo": 4}
    assert report["per_image"] == {"psnr": [1, 2, 3, 6]}
    assert "ratio" in report["about"]["psnr"]
    json.dumps(report, allow_nan=False)


def test_an_infinite_score_has_no_mean():
    report = scores.report({"psnr": Psnr()}, {"psnr": torch.tensor([1.0, torch.inf])}, [{"prompt": ""}] * 2)
    assert report["metrics"]["psnr"] is None
    assert report["per_image"]["psnr"] == [1, None]
