"""Draw the picture of a table: a row for each prompt, a column for each method."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from fp4dit.utils.files import read_json

INK, PAPER = (20, 20, 20), (255, 255, 255)


def draw_image_grid(
    folders: Mapping[str, Path], prompts: int, tile: int = 160, gap: int = 6
) -> Image.Image:
    """Draw the first images of each folder beside those of the other folders.

    The prompts are those of the first folder. An image that another folder lacks is left blank.

    Args:
        folders: Folder of each label, with `images.json` and `images/*.png`.
        prompts: Number of prompts.
        tile: Width of an image in pixels.
        gap: Pixels between images.
    """
    first_folder = next(iter(folders.values()))
    entries = read_json(first_folder / "images.json")
    captions = [entry["prompt"] for entry in entries[:prompts]]
    font = ImageFont.load_default(15)
    titles = [textwrap.fill(label, tile // 8) for label in folders]
    num_lines = max(title.count("\n") + 1 for title in titles)
    left, top, pitch = tile, 8 + 19 * num_lines, tile + gap
    size = (left + gap + pitch * len(folders), top + gap + pitch * len(captions))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (title, folder) in enumerate(zip(titles, folders.values(), strict=True)):
        x = left + gap + pitch * column
        draw.multiline_text((x + tile / 2, top), title, INK, font, anchor="md", align="center")
        for line in range(len(captions)):
            path = folder / "images" / f"{line:05}.png"
            if path.is_file():
                canvas.paste(load_tile(path, tile), (x, top + gap + pitch * line))
    for line, caption in enumerate(captions):
        text, y = textwrap.fill(caption, tile // 8), top + gap + pitch * line + tile / 2
        draw.multiline_text((left - 2, y), text, INK, font, anchor="rm", align="right")
    return canvas


def stack_pictures(pictures: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """Put pictures below each other, with `gap` pixels between them."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height + gap
    return canvas


def draw_difference(first: Path, second: Path, gain: int = 4) -> Image.Image:
    """Return the absolute difference of two images of one size, `gain` times as bright."""
    with Image.open(first) as a, Image.open(second) as b:
        difference = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    return difference.point([min(255, gain * value) for value in range(256)] * 3)


def load_tile(path: Path, tile: int) -> Image.Image:
    """Load an image and resize it to a square of `tile` pixels."""
    with Image.open(path) as image:
        kernel = Image.Resampling.LANCZOS if image.width > tile else Image.Resampling.BICUBIC
        return image.convert("RGB").resize((tile, tile), kernel)
