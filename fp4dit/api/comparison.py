"""The result of a comparison of methods, which prints as a table and shows the images."""

import base64
import io
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from fp4dit.api.report import QuantizationReport
from fp4dit.tables.images import draw_image_grid
from fp4dit.utils.files import write_json
from fp4dit.utils.formatting import align_columns, format_bytes
from fp4dit.utils.image_files import FRAME_MILLISECONDS
from fp4dit.utils.statistics import Interval, compute_interval


class PrintedMetric(NamedTuple):
    """How a metric is printed.

    Attributes:
        title: Heading of the column.
        digits: Number of decimals.
        factor: Printed value / stored value.
    """

    title: str
    digits: int
    factor: float

    def format_interval(self, interval: Interval | None) -> str:
        """Return a mean and its interval, or a dash."""
        if interval is None:
            return "–"
        numbers = []
        for value in (interval.mean, interval.low, interval.high):
            numbers.append(f"{self.factor * value:.{self.digits}f}")
        return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


@dataclass(frozen=True)
class ComparedMethod:
    """The images or videos of one method, and their scores.

    Attributes:
        method: Name of the preset, or `full precision`.
        frames: The frames of the video of each prompt. An image is a single frame.
        values: Value of each image or video, by metric; empty for full precision.
        report: What the method quantized; None for full precision.
    """

    method: str
    frames: Sequence[Sequence[Image.Image]]
    values: Mapping[str, Sequence[float]]
    report: QuantizationReport | None = None

    @property
    def images(self) -> list[Image.Image]:
        """The image of each prompt, or the first frame of its video."""
        return [frames[0] for frames in self.frames]

    def compute_interval(self, metric: str) -> Interval | None:
        """Return the mean of a metric and its 95 % interval; None if a value is infinite."""
        values = self.values.get(metric, ())
        return compute_interval(values) if values and all(map(isfinite, values)) else None


@dataclass(frozen=True, repr=False)
class Comparison:
    """Methods compared on the same prompts and seeds, with full precision as the reference.

    It prints as a table. A notebook shows the table, and the images side by side; videos play in
    step.

    Attributes:
        prompts: Prompt of each image.
        seeds: Seed of each image.
        methods: Full precision, and then the methods.
        metrics: How each metric is printed.

    Example:
        >>> comparison = fp4dit.compare(pipe, ["nvfp4_rtn", "nvfp4_4over6"], prompts=prompts)
        >>> print(comparison)
        >>> comparison.draw_grid().save("comparison.png")
        >>> pandas.DataFrame(comparison.to_rows())
    """

    prompts: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[ComparedMethod]
    metrics: Mapping[str, PrintedMetric]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a dictionary for each method, with the mean and the interval of each metric."""
        rows = []
        for compared in self.methods:
            report = compared.report
            row: dict[str, Any] = {
                "method": compared.method,
                "bits_weight": report.bits_weight if report else 16.0,
                "bits_activation": report.bits_activation if report else 16.0,
                "bytes": report.bytes if report else None,
            }
            for name in self.metrics:
                interval = compared.compute_interval(name)
                row[name] = interval and interval.mean
                row[f"{name}_low"] = interval and interval.low
                row[f"{name}_high"] = interval and interval.high
            rows.append(row)
        return rows

    @property
    def num_frames(self) -> int:
        """Number of frames of the longest video; 1 for images."""
        return max(len(frames) for compared in self.methods for frames in compared.frames)

    def draw_grid(self, tile: int = 160, frame: int = 0, gain: int = 0) -> Image.Image:
        """Return a picture with a row for each prompt and a column for each method.

        Args:
            tile: Width of an image in pixels.
            frame: Number of the frame of videos. A shorter video stays at its last frame.
            gain: If not 0, a line below each prompt shows how images differ from those of full
                precision, this many times as bright.
        """
        with tempfile.TemporaryDirectory() as place:
            folders = {}
            for number, compared in enumerate(self.methods):
                folder = folders[compared.method] = Path(place) / str(number)
                (folder / "images").mkdir(parents=True)
                write_json(folder / "images.json", [{"prompt": text} for text in self.prompts])
                for i, frames in enumerate(compared.frames):
                    shown = frames[min(frame, len(frames) - 1)]
                    shown.save(folder / "images" / f"{i:05}.png")
            return draw_image_grid(folders, range(len(self.prompts)), tile, gain=gain)

    def save_video(self, file: Path | str | BinaryIO, tile: int = 160) -> None:
        """Write the pictures of all frames as an animated PNG, or an image as PNG.

        Args:
            file: The file.
            tile: Width of an image in pixels.
        """
        first, *others = [self.draw_grid(tile, frame) for frame in range(self.num_frames)]
        animation: dict[str, Any] = {}
        if others:
            animation = {"save_all": True, "append_images": others, "duration": FRAME_MILLISECONDS}
        first.save(file, format="PNG", **animation)

    def list_cells(self) -> list[tuple[str, ...]]:
        """Return the cells of the table, headings first."""
        titles = [metric.title for metric in self.metrics.values()]
        lines = [("method", "bits W", "bits A", "size", *titles)]
        for compared, row in zip(self.methods, self.to_rows(), strict=True):
            bits = f"{row['bits_weight']:.2f}", f"{row['bits_activation']:.2f}"
            scores = []
            for name, metric in self.metrics.items():
                scores.append(metric.format_interval(compared.compute_interval(name)))
            size = format_bytes(row["bytes"] or 0) or "–"
            lines.append((compared.method, *bits, size, *scores))
        return lines

    def __str__(self) -> str:
        return "\n".join(align_columns(self.list_cells()))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heading, *lines = self.list_cells()
        rows = ["".join(f"<th>{escape(cell)}</th>" for cell in heading)]
        rows += ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"

    def embed_picture(self) -> str:
        """Return an HTML element that contains the picture, which plays if there are videos."""
        buffer = io.BytesIO()
        self.save_video(buffer)
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img src="data:image/png;base64,{data}">'

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return {
            "text/plain": str(self),
            "text/html": self._repr_html_() + self.embed_picture(),
        }
