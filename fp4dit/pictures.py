"""One picture of a table: prompts down, methods across, groups one above the other."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

INK, PAPER = (20, 20, 20), (255, 255, 255)


def grid(folders: Mapping[str, Path], prompts: int, tile: int = 160, gap: int = 6) -> Image.Image:
    """The first `prompts` images of each folder (`images/*.png`, `images.json`), each `tile` pixels wide.

    The prompts are those of the first folder; an image that another folder lacks is left blank.
    """
    captions = [entry["prompt"] for entry in json.loads((next(iter(folders.values())) / "images.json").read_text())]
    captions = captions[:prompts]
    font = ImageFont.load_default(15)
    titles = [textwrap.fill(label, tile // 8) for label in folders]
    left, top, pitch = tile, 8 + 19 * max(title.count("\n") + 1 for title in titles), tile + gap
    canvas = Image.new("RGB", (left + gap + pitch * len(folders), top + gap + pitch * len(captions)), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, (title, folder) in enumerate(zip(titles, folders.values(), strict=True)):
        x = left + gap + pitch * column
        draw.multiline_text((x + tile / 2, top), title, INK, font, anchor="md", align="center")
        for line in range(len(captions)):
            path = folder / "images" / f"{line:05}.png"
            if path.is_file():
                canvas.paste(fitted(path, tile), (x, top + gap + pitch * line))
    for line, caption in enumerate(captions):
        y = top + gap + pitch * line + tile / 2
        draw.multiline_text((left - 2, y), textwrap.fill(caption, tile // 8), INK, font, anchor="rm", align="right")
    return canvas


def stacked(pictures: Sequence[Image.Image], gap: int = 24) -> Image.Image:
    """One above the other."""
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (max(picture.width for picture in pictures), height), PAPER)
    y = 0
    for picture in pictures:
        canvas.paste(picture, (0, y))
        y += picture.height + gap
    return canvas


def difference(one: Path, other: Path, gain: int = 4) -> Image.Image:
    """How far two images of one size are apart, in each channel and `gain` times as bright."""
    with Image.open(one) as a, Image.open(other) as b:
        apart = ImageChops.difference(a.convert("RGB"), b.convert("RGB"))
    return apart.point([min(255, gain * value) for value in range(256)] * 3)


def fitted(path: Path, tile: int) -> Image.Image:
    with Image.open(path) as image:
        kernel = Image.Resampling.LANCZOS if image.width > tile else Image.Resampling.BICUBIC
        return image.convert("RGB").resize((tile, tile), kernel)
