"""The images of a report: which prompts it shows, and each image as WebP within a limit."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image
from tqdm import tqdm

from fp4dit.errors import UserError
from fp4dit.report.material import Material

LOSSLESS = 128  # pixels of a side, up to which the exact image costs next to nothing

Shot = tuple[str, int]  # a prompt and a seed: what makes images of two rows comparable


@dataclass(frozen=True)
class Limits:
    """At most so many `prompts` (None: all), each side at most so many `pixels`, and all images together at most so
    many `megabytes`. `quality` is WebP's, up to 100; None is lossless up to 128 pixels and 90 beyond.

    Raises:
        UserError: if one of them allows nothing.
    """

    prompts: int | None = 64
    pixels: int = 512
    quality: int | None = None
    megabytes: float | int = 100

    def __post_init__(self) -> None:
        given = {"prompts": self.prompts, "pixels": self.pixels, "megabytes": self.megabytes, "quality": self.quality}
        for name, value in given.items():
            if value is not None and value <= 0:
                raise UserError(f"report.{name}={value}: give a number above 0")


@dataclass(frozen=True)
class Album:
    """Images of several rows by prompt and seed. Folders hold `images.json` and `images/*.png`."""

    materials: Sequence[Material]
    limits: Limits = field(default_factory=Limits)
    worst_by: str | None = None
    higher_is_better: bool = True

    @cached_property
    def folders(self) -> dict[Path, dict[Shot, int]]:
        """Which image of each folder belongs to which prompt and seed."""
        paths = dict.fromkeys(path for m in self.materials for path in (m.reference, m.images) if path)
        read = {path: json.loads((path / "images.json").read_text()) for path in paths}
        return {path: {(d["prompt"], d["seed"]): i for i, d in enumerate(drawn)} for path, drawn in read.items()}

    @cached_property
    def drawn(self) -> list[Shot]:
        """All there are, in the order in which they were drawn."""
        return list(dict.fromkeys(shot for found in self.folders.values() for shot in found))

    @cached_property
    def shots(self) -> list[Shot]:
        """Those that are shown: of too many, the worst ones, still in the order in which they were drawn."""
        if self.limits.prompts is None or len(self.drawn) <= self.limits.prompts:
            return self.drawn
        values: dict[Shot, list[float]] = {}
        for material in self.materials:
            for shot, value in scores(material, self.worst_by or "").items():
                values.setdefault(shot, []).append(value)
        sign = 1 if self.higher_is_better else -1
        badness = {shot: sign * fmean(found) for shot, found in values.items()}
        chosen = set(sorted(self.drawn, key=lambda shot: badness.get(shot, float("inf")))[: self.limits.prompts])
        return [shot for shot in self.drawn if shot in chosen]

    def blocks(self) -> Iterator[tuple[Path, list[str | None]]]:
        """For each folder its images in the order of `shots`, as WebP in base64; None where it has none.

        Raises:
            UserError: as soon as they are more than the limit.
        """
        room = self.limits.megabytes * 1e6
        bar = tqdm(self.folders.items(), desc="images of rows", unit="row", disable=None)
        with ThreadPoolExecutor() as pool, bar:
            for done, (path, found) in enumerate(bar, 1):
                images = list(pool.map(lambda shot, p=path, f=found: self.encoded(p, f.get(shot)), self.shots))
                room -= sum(len(image) for image in images if image)
                if room < 0:
                    raise UserError(self.too_large(done))
                yield path, images

    def encoded(self, folder: Path, index: int | None) -> str | None:
        path = folder / "images" / f"{index:05}.png" if index is not None else None
        return webp(path, self.limits) if path and path.is_file() else None

    def too_large(self, done: int) -> str:
        limits = self.limits
        return (
            f"the images of {done} of {len(self.folders)} rows take more than report.megabytes={limits.megabytes:g}, "
            f"with {len(self.shots)} prompts of at most {limits.pixels} pixels: give a smaller report.prompts, "
            "report.pixels or report.quality, or a larger report.megabytes"
        )

    @property
    def ratio(self) -> float:
        """Width by height of the first image."""
        for path in self.folders:
            for image in sorted((path / "images").glob("*.png")):
                with Image.open(image) as found:
                    return found.width / found.height
        return 1.0

    def encoding(self) -> str:
        """What became of the images, for whoever looks at them closely."""
        if not self.drawn:
            return ""
        some = len(self.shots) < len(self.drawn)
        which = f"The {len(self.shots)} prompts of {len(self.drawn)} with the worst mean over methods. " if some else ""
        quality = self.limits.quality or 90
        exact = f" Images of up to {LOSSLESS} pixels are exact." if self.limits.quality is None else ""
        return (
            f"{which}Images are WebP of quality {quality}, at most {self.limits.pixels} pixels wide or high; their "
            f"difference contains what that loses.{exact}"
        )


def scores(material: Material, metric: str) -> Mapping[Shot, float]:
    """An image's score, by prompt and seed."""
    row = material.scored
    values: Sequence[Any] = row.per_image.get(metric, ())
    return {(d["prompt"], d["seed"]): v for d, v in zip(row.images, values, strict=False) if v is not None}


def webp(path: Path, limits: Limits) -> str:
    with Image.open(path) as found:
        image = found.convert("RGB")
    image.thumbnail((limits.pixels, limits.pixels), Image.Resampling.LANCZOS)
    exact = limits.quality is None and max(image.size) <= LOSSLESS
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=exact, quality=100 if exact else limits.quality or 90, method=4)
    return base64.b64encode(file.getvalue()).decode()
