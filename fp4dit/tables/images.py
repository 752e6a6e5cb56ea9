"""Draw the picture of a table: a row for each prompt, a column for each method."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFont

from fp4dit.utils.files import read_json

INK, PAPER = (20, 20, 20), (255, 255, 255)


def draw_image_grid(
    folders: Mapping[str, Path],
    images: Sequence[int],
    tile: int = 160,
    gap: int = 6,
    gain: int = 0,
) -> Image.Image:
    """Draw some images of each folder beside those of the other folders.

    The prompts are those of the first folder. An image that another folder lacks is left blank.

    Args:
        folders: Folder of each label, with `images.json` and `images/*.png`.
        images: Numbers of the images, from 0 on. Those that there are not are left out.
        tile: Width of an image in pixels.
        gap: Pixels between images.
        gain: If not 0, a line below each prompt shows how images differ from those of the first
            folder, this many times as bright.
    """
    labels, paths = list(folders), list(folders.values())
    entries = read_json(paths[0] / "images.json")
    lines: list[tuple[str, list[Image.Image | None]]] = []
    for number in images:
        if number >= len(entries):
            continue
        files = [folder / "images" / f"{number:05}.png" for folder in paths]
        pictures = [load_tile(file, tile) if file.is_file() else None for file in files]
        lines.append((entries[number]["prompt"], pictures))
        if gain:
            lines.append((f"difference, {gain} times", draw_line_differences(files, tile, gain)))
    return draw_lines(labels, lines, tile, gap)


def draw_line_differences(files: Sequence[Path], tile: int, gain: int) -> list[Image.Image | None]:
    """Return how each image differs from the first one; nothing for the first and missing ones."""
    differences: list[Image.Image | None] = [None]
    for file in files[1:]:
        both = files[0].is_file() and file.is_file()
        differences.append(
            resize_tile(draw_difference(files[0], file, gain), tile) if both else None
        )
    return differences


def draw_lines(
    labels: Sequence[str],
    lines: Sequence[tuple[str, Sequence[Image.Image | None]]],
    tile: int,
    gap: int,
) -> Image.Image:
    """Draw lines of tiles below the labels of their columns, each beside its caption."""
    font = ImageFont.load_default(15)
    titles = [textwrap.fill(label, tile // 8) for label in labels]
    num_lines = max(title.count("\n") + 1 for title in titles)
    left, top, pitch = tile, 8 + 19 * num_lines, tile + gap
    size = (left + gap + pitch * len(labels), top + gap + pitch * len(lines))
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        x = left + gap + pitch * column + tile / 2
        draw.multiline_text((x, top), title, INK, font, anchor="md", align="center")
    for line, (caption, tiles) in enumerate(lines):
        text, y = textwrap.fill(caption, tile // 8), top + gap + pitch * line
        draw.multiline_text((left - 2, y + tile / 2), text, INK, font, anchor="rm", align="right")
        for column, picture in enumerate(tiles):
            if picture is not None:
                canvas.paste(picture, (left + gap + pitch * column, y))
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
        return resize_tile(image.convert("RGB"), tile)


def resize_tile(image: Image.Image, tile: int) -> Image.Image:
    """Resize an image to a square of `tile` pixels."""
    kernel = Image.Resampling.LANCZOS if image.width > tile else Image.Resampling.BICUBIC
    return image.resize((tile, tile), kernel)
