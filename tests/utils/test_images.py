"""Images and videos are kept without loss."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from fp4dit.utils.images import read_image, save_image


@pytest.mark.parametrize("shape", [(3, 8, 6), (5, 3, 8, 6)], ids=["image", "video"])
def test_pixels_survive_a_file(shape: tuple[int, ...], tmp_path: Path):
    torch.manual_seed(0)
    pixels = torch.randint(256, shape) / 255
    if len(shape) == 4:
        pixels[1:4] = pixels[0]  # frames that stand still
    save_image(pixels, tmp_path / "x.png")
    assert torch.equal(read_image(tmp_path / "x.png"), pixels)


def test_a_video_is_an_animation_for_other_programs(tmp_path: Path):
    save_image(torch.rand(4, 3, 8, 8), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG"
        assert getattr(image, "n_frames", 1) == 4
