"""Images of a report: choose the prompts to show, and encode their images as WebP.

A video becomes one WebP image with its frames below each other. The page shows the same frame of
all videos at a time, which browsers do not promise for animated images.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from tqdm import tqdm

from fp4dit.report.row_data import RowData
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import read_json

LOSSLESS_PIXELS = 128  # longest side of images that are small enough to be kept lossless

DEFAULT_QUALITY = 90

MAX_WEBP_PIXELS = 16383  # the longest side that WebP can store

ImageKey = tuple[str, int]  # prompt and seed, which identify the image in every row


@dataclass(frozen=True)
class ImageLimits:
    """Limits of a report's images.

    Attributes:
        prompts: Largest number of prompts; None shows all.
        pixels: Largest length of the longer side.
        quality: Quality of WebP, up to 100. None is lossless up to 128 pixels, and 90 beyond.
        frames: Largest number of frames of a video, of which the first ones are shown.
        megabytes: Largest size of all images together, as base64.

    Raises:
        UserError: if one of them is not positive.
    """

    prompts: int | None = 64
    pixels: int = 512
    quality: int | None = None
    frames: int = 24
    megabytes: float | int = 100

    def __post_init__(self) -> None:
        for name in ("prompts", "pixels", "megabytes", "quality", "frames"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"report.{name}={value}: give a number above 0")


@dataclass(frozen=True)
class ReportImages:
    """Images of several rows, by prompt and seed.

    Attributes:
        rows: Data of the rows.
        limits: Limits of number and size.
        worst_by: Metric that chooses the prompts with the worst mean, if there are too many.
        higher_is_better: Whether a higher value of this metric is better.

    Example:
        >>> images = ReportImages(rows, ImageLimits(prompts=16), worst_by="psnr")
        >>> dict(images.encode_folders())[rows[0].images]  # base64 of 16 images
    """

    rows: Sequence[RowData]
    limits: ImageLimits = field(default_factory=ImageLimits)
    worst_by: str | None = None
    higher_is_better: bool = True

    @cached_property
    def folders(self) -> dict[Path, dict[ImageKey, int]]:
        """Number of each image in each folder."""
        folders: dict[Path, dict[ImageKey, int]] = {}
        for row in self.rows:
            for folder in (row.reference, row.images):
                if folder and folder not in folders:
                    drawn = read_json(folder / "images.json")
                    numbers: dict[ImageKey, int] = {}
                    for number, image in enumerate(drawn):
                        numbers[image["prompt"], image["seed"]] = number
                    folders[folder] = numbers
        return folders

    @cached_property
    def all_keys(self) -> list[ImageKey]:
        """Prompts and seeds of all images, in the order in which they were drawn."""
        keys: dict[ImageKey, None] = {}
        for numbers in self.folders.values():
            keys.update(dict.fromkeys(numbers))
        return list(keys)

    @cached_property
    def shown_keys(self) -> list[ImageKey]:
        """Prompts and seeds that are shown, in the order in which they were drawn.

        If there are too many, they are those with the worst mean over rows.
        """
        if self.limits.prompts is None or len(self.all_keys) <= self.limits.prompts:
            return self.all_keys
        values: dict[ImageKey, list[float]] = {}
        for row in self.rows:
            for key, value in scores_by_image(row, self.worst_by or "").items():
                values.setdefault(key, []).append(value)
        sign = 1 if self.higher_is_better else -1
        goodness = {key: sign * fmean(scores) for key, scores in values.items()}
        worst_first = sorted(self.all_keys, key=lambda key: goodness.get(key, float("inf")))
        shown = set(worst_first[: self.limits.prompts])
        return [key for key in self.all_keys if key in shown]

    def encode_folders(self) -> Iterator[tuple[Path, list[str | None]]]:
        """Yield each folder and its images, in the order of `shown_keys`.

        An image is WebP in base64, or None if the folder does not have it.

        Raises:
            UserError: as soon as the images exceed the limit.
        """
        bytes_left = self.limits.megabytes * 1e6
        bar = tqdm(self.folders.items(), desc="images of rows", unit="row", disable=None)
        with ThreadPoolExecutor() as pool, bar:
            for num_folders, (folder, numbers) in enumerate(bar, 1):
                shown = [numbers.get(key) for key in self.shown_keys]
                images = list(pool.map(partial(self.encode_image, folder), shown))
                bytes_left -= sum(len(image) for image in images if image)
                if bytes_left < 0:
                    raise UserError(self.describe_excess(num_folders))
                yield folder, images

    def encode_image(self, folder: Path, number: int | None) -> str | None:
        """Return an image of a folder as WebP in base64, or None if there is none."""
        if number is None:
            return None
        path = folder / "images" / f"{number:05}.png"
        return encode_webp(path, self.limits, self.num_frames) if path.is_file() else None

    def describe_excess(self, num_folders: int) -> str:
        """Return the error message for images that exceed the limit."""
        limits = self.limits
        return (
            f"the images of {num_folders} of {len(self.folders)} rows take more than "
            f"report.megabytes={limits.megabytes:g}, with {len(self.shown_keys)} prompts of at "
            f"most {limits.pixels} pixels: give a smaller report.prompts, report.pixels or "
            f"report.quality{', or report.frames' if self.num_frames > 1 else ''}, or a larger "
            "report.megabytes"
        )

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Width, height and number of frames of the first image or video."""
        for folder in self.folders:
            for path in sorted((folder / "images").glob("*.png")):
                with Image.open(path) as image:
                    return image.width, image.height, getattr(image, "n_frames", 1)
        return 1, 1, 1

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height of the first image on the page."""
        return fit_size(self.shape[:2], self.limits.pixels)

    @property
    def num_frames(self) -> int:
        """Number of frames of each video that are shown; 1 for images."""
        return min(self.shape[2], self.limits.frames, MAX_WEBP_PIXELS // self.shown_size[1])

    def describe_encoding(self) -> str:
        """Describe which images are shown and how they are encoded, for a close look at them."""
        if not self.all_keys:
            return ""
        sentences = []
        if len(self.shown_keys) < len(self.all_keys):
            sentences.append(
                f"The {len(self.shown_keys)} prompts of {len(self.all_keys)} with the worst mean "
                "over methods."
            )
        quality = self.limits.quality or DEFAULT_QUALITY
        sentences.append(
            f"Images are WebP of quality {quality}, at most {self.limits.pixels} pixels wide or "
            "high; their difference contains what that loses."
        )
        if self.limits.quality is None:
            sentences.append(f"Images of up to {LOSSLESS_PIXELS} pixels are exact.")
        if self.num_frames < self.shape[2]:
            sentences.append(
                f"Videos show their first {self.num_frames} frames of {self.shape[2]}; scores are "
                "of all frames."
            )
        return " ".join(sentences)


def scores_by_image(row: RowData, metric: str) -> Mapping[ImageKey, float]:
    """Return the value of each image of a row, by prompt and seed."""
    values: Sequence[Any] = row.scored.per_image.get(metric, ())
    scores = {}
    for drawn, value in zip(row.scored.images, values, strict=False):
        if value is not None:
            scores[drawn["prompt"], drawn["seed"]] = value
    return scores


def fit_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """Return the size of an image whose longer side is at most `pixels`."""
    scale = min(1.0, pixels / max(size))
    return max(1, round(scale * size[0])), max(1, round(scale * size[1]))


def encode_webp(path: Path, limits: ImageLimits, frames: int = 1) -> str:
    """Return an image as WebP in base64, no larger than the limits allow.

    Args:
        path: The file of an image or a video.
        limits: The limits.
        frames: The number of frames, which are below each other. A shorter video ends with its
            last frame.
    """
    with Image.open(path) as source:
        width, height = fit_size(source.size, limits.pixels)
        image = Image.new("RGB", (width, frames * height))
        for number in range(frames):
            source.seek(min(number, getattr(source, "n_frames", 1) - 1))
            frame = source.convert("RGB")
            if frame.size != (width, height):
                frame = frame.resize((width, height), Image.Resampling.LANCZOS)
            image.paste(frame, (0, number * height))
    lossless = limits.quality is None and max(width, height) <= LOSSLESS_PIXELS
    quality = 100 if lossless else limits.quality or DEFAULT_QUALITY
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=quality, method=4)
    return base64.b64encode(file.getvalue()).decode()
