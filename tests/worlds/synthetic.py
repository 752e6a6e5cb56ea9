"""Synthetic artwork in the layout of the npm package."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fp4dit.worlds.emoji.world import EMOJI


def write_artwork(folder: Path) -> Path:
    """Write a disc of a distinct colour for every emoji, opaque inside, with a transparent rim."""
    images = folder / "img/google/64"
    images.mkdir(parents=True)
    axis = np.arange(64) - 31.5
    radius = np.hypot(*np.meshgrid(axis, axis))
    entries = []
    for number, short_name in enumerate(EMOJI.values()):
        pixels = np.zeros((64, 64, 4), np.uint8)
        pixels[..., :3] = color_of(number)
        pixels[..., 3] = np.where(radius < 20, 255, np.where(radius < 30, 128, 0))
        Image.fromarray(pixels, "RGBA").save(images / f"{short_name}.png")
        entries.append({"short_name": short_name, "image": f"{short_name}.png"})
    (folder / "emoji.json").write_text(json.dumps(entries))
    return folder


def color_of(number: int) -> tuple[int, int, int]:
    """Return a distinct colour for each number."""
    return 60 * (number % 4) + 20, 60 * (number // 4 % 4) + 20, 60 * (number // 16) + 20
