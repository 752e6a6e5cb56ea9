"""Read the Noto emoji of the npm package `emoji-datasource-google`."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from fp4dit.utils.errors import UserError

PACKAGE = "emoji-datasource-google@16.0.0"
Sprite = Float[Tensor, "4 s s"]  # red, green, blue in [0, 1], multiplied by alpha; alpha


@cache
def read_sprites(
    folder: str | None,
    short_names: tuple[tuple[str, str], ...],
    pixels: tuple[tuple[str, int], ...],
) -> Mapping[tuple[str, str], Sprite]:
    """Return a square sprite per (kind, size).

    Args:
        folder: Folder of the unpacked npm package.
        short_names: Each kind with its name in `emoji.json`.
        pixels: Each size with the height and width of its sprites.

    Raises:
        UserError: If `folder` is not the unpacked package.
    """
    files = find_emoji_files(folder)
    sprites = {}
    for kind, short_name in short_names:
        image = read_image(files[short_name])
        for size, length in pixels:
            sprites[kind, size] = resize_image(image, length)
    return sprites


def find_emoji_files(folder: str | None) -> dict[str, Path]:
    """Return the 64-pixel PNG file of every emoji, by its short name."""
    index = Path(folder or "package") / "emoji.json"
    if folder is None or not index.exists():
        problem = f"There is no file {index}"
        if folder is None:
            problem = "No folder of the artwork is given"
        raise UserError(
            f"{problem}. Run `npm pack {PACKAGE}` and "
            "`tar xzf emoji-datasource-google-16.0.0.tgz`, then add artwork=package "
            "(the folder that holds emoji.json)"
        )
    files = {}
    for entry in json.loads(index.read_text()):
        files[entry["short_name"]] = index.parent / "img/google/64" / entry["image"]
    return files


def read_image(path: Path) -> Float[np.ndarray, "h w 4"]:
    """Return a PNG file's pixels in [0, 1], colours multiplied by alpha."""
    with Image.open(path) as file:
        image = np.asarray(file.convert("RGBA"), np.float32) / 255
    return premultiply_alpha(image)


def premultiply_alpha(image: Float[np.ndarray, "h w 4"]) -> Float[np.ndarray, "h w 4"]:
    """Multiply colours by alpha, so that transparent pixels add nothing to a resized image."""
    return np.concatenate([image[..., :3] * image[..., 3:], image[..., 3:]], axis=-1)


def resize_image(image: Float[np.ndarray, "h w 4"], length: int) -> Sprite:
    """Resize an image premultiplied by alpha to a square of this length, by Lanczos."""
    channels = []
    for channel in np.moveaxis(image, -1, 0):
        resized = Image.fromarray(channel).resize((length, length), Image.Resampling.LANCZOS)
        channels.append(torch.from_numpy(np.array(resized)))
    sprite = torch.stack(channels).clamp(0, 1)
    return torch.cat([sprite[:3].minimum(sprite[3:]), sprite[3:]])  # no colour above its alpha
