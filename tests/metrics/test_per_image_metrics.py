"""Values of per-image metrics depend only on image, reference and prompt."""

from pathlib import Path

import pytest
import torch

from fp4dit.metrics.base import PerImageMetric
from fp4dit.metrics.clip import CLIPImageSimilarity, CLIPScore
from fp4dit.metrics.full_reference import LPIPS, PSNR, SSIM
from fp4dit.metrics.hps import HPSv21
from fp4dit.metrics.pickscore import PickScore
from fp4dit.worlds import ShapesWorld
from tests.helpers.tiny_clip import (
    ARCHITECTURE,
    convert_to_open_clip,
    draw_pictures,
    make_clip,
    make_tokenizer,
    save_open_clip,
)
from tests.metrics.test_lpips import make_network

SHIPPED = "pkg://fp4dit/worlds/shapes/weights/clip"
WORDS = ["a cat", "two red cubes on a table", "a dog " * 60, "it's 1987", "", "blue"]


@pytest.fixture(scope="module")
def metrics(tmp_path_factory) -> dict[str, PerImageMetric]:
    """Return every metric, on tiny or random networks."""
    root: Path = tmp_path_factory.mktemp("networks")
    model = make_clip("gelu")
    folder = str(save_open_clip(model, root / "clip"))
    model.save_pretrained(root / "pickscore")
    make_tokenizer().save_pretrained(root / "words")
    torch.save({"state_dict": convert_to_open_clip(model)}, root / "hps.pt")
    torch.save(make_network("alex").state_dict(), root / "alex.pth")
    return {
        "psnr": PSNR(),
        "ssim": SSIM(),
        "clip": CLIPScore(folder),
        "clip_image": CLIPImageSimilarity(folder),
        "hps": HPSv21(str(root / "hps.pt"), ARCHITECTURE),
        "pickscore": PickScore(
            str(root / "pickscore"), {"path": str(root / "words" / "tokenizer.json")}
        ),
        "lpips": LPIPS(str(root / "alex.pth")),
    }


@pytest.mark.parametrize(
    "name", ["psnr", "ssim", "clip", "clip_image", "hps", "pickscore", "lpips"]
)
def test_values_do_not_depend_on_batches_or_order(metrics: dict[str, PerImageMetric], name: str):
    images, reference = (draw_pictures(6, 48, 64, seed)[0] for seed in (0, 1))

    def score(chosen: list[int]) -> torch.Tensor:
        prompts = [WORDS[i] for i in chosen]
        return metrics[name].score(images[chosen], reference[chosen], prompts)

    together = score([0, 1, 2, 3, 4, 5])
    one_by_one = torch.cat([score([i]) for i in range(6)])
    backwards = score([5, 4, 3, 2, 1, 0]).flip(0)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backwards, together, atol=1e-5, rtol=1e-5)
    assert together.shape == (6,)
    assert together.unique().numel() > 1


def test_prompts_of_other_images_score_lower():
    """Score scenes with different captions by the shipped CLIP."""
    scenes = {
        scene.caption: scene
        for _, scene in zip(range(64), ShapesWorld().iterate_scenes(0, True), strict=False)
    }
    images, prompts = ShapesWorld().render_scenes(list(scenes.values())) / 2 + 0.5, list(scenes)
    metric = CLIPScore(SHIPPED)
    right, wrong = (
        metric.score(images, images, captions) for captions in (prompts, prompts[1:] + prompts[:1])
    )
    assert right.mean() > wrong.mean() + 10
    assert (right > wrong).float().mean() > 0.9
