"""What every metric of single images owes: values that depend on nothing but image, reference and prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fp4dit.metrics.base import PerImage
from fp4dit.metrics.clip import ClipScore
from fp4dit.metrics.clip_image import ClipImage
from fp4dit.metrics.hps import Hps
from fp4dit.metrics.lpips import Lpips
from fp4dit.metrics.pickscore import PickScore
from fp4dit.metrics.psnr import Psnr
from fp4dit.metrics.ssim import Ssim
from fp4dit.models.shapes.world import render, scenes
from tests.test_lpips import network
from tests.tiny_clip import ARCHITECTURE, clip, in_open_clip, pictures, save_open_clip, tokenizer

SHIPPED = "pkg://fp4dit.models.shapes/weights/clip"
WORDS = ["a cat", "two red cubes on a table", "a dog " * 60, "it's 1987", "", "blue"]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, PerImage]:
    """Every metric, on tiny or random networks."""
    root: Path = tmp_path_factory.mktemp("networks")
    model = clip("gelu")
    folder = str(save_open_clip(model, root / "clip"))
    model.save_pretrained(root / "pickscore")
    tokenizer().save_pretrained(root / "words")
    torch.save({"state_dict": in_open_clip(model)}, root / "hps.pt")
    torch.save(network("alex").state_dict(), root / "alex.pth")
    return {
        "psnr": Psnr(),
        "ssim": Ssim(),
        "clip": ClipScore(folder),
        "clip_image": ClipImage(folder),
        "hps": Hps(str(root / "hps.pt"), "2.1", ARCHITECTURE),
        "pickscore": PickScore(str(root / "pickscore"), {"path": str(root / "words" / "tokenizer.json")}),
        "lpips": Lpips(str(root / "alex.pth")),
    }


@pytest.mark.parametrize("name", ["psnr", "ssim", "clip", "clip_image", "hps", "pickscore", "lpips"])
def test_values_do_not_depend_on_batches_or_order(made: dict[str, PerImage], name: str):
    images, reference = (pictures(6, 48, 64, seed)[0] for seed in (0, 1))
    score: Callable[[list[int]], torch.Tensor] = lambda chosen: made[name].score(
        images[chosen], reference[chosen], [WORDS[i] for i in chosen]
    )
    together = score([0, 1, 2, 3, 4, 5])
    one_by_one = torch.cat([score([i]) for i in range(6)])
    backwards = score([5, 4, 3, 2, 1, 0]).flip(0)
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backwards, together, atol=1e-5, rtol=1e-5)
    assert together.shape == (6,)
    assert together.unique().numel() > 1


def test_prompts_of_other_images_score_lower():
    """By the shipped CLIP, on scenes of which no two have one caption."""
    found = {scene.caption: scene for _, scene in zip(range(64), scenes(0, True), strict=False)}
    images, prompts = render(list(found.values())) / 2 + 0.5, list(found)
    metric = ClipScore(SHIPPED)
    right, wrong = (metric.score(images, images, given) for given in (prompts, prompts[1:] + prompts[:1]))
    assert right.mean() > wrong.mean() + 10
    assert (right > wrong).float().mean() > 0.9
