"""Columns and rows of a table, made from the results of the score stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from fp4dit.tables.published import PublishedResult
from fp4dit.utils.errors import UserError
from fp4dit.utils.statistics import compute_intervals

Value = float | int | None


@dataclass(frozen=True)
class TableColumn:
    """A number of each row, and how it is printed.

    Attributes:
        name: Name of the number in `ScoredRow.values`.
        title: Heading.
        digits: Number of decimals that are printed.
        factor: Printed value / stored value.
        per_image: Whether it is a mean over images, with NAME_low and NAME_high beside it.
        per_set: Whether it is a metric of a set of images, also with NAME_low and NAME_high.
        better: "higher" or "lower" if rows are compared by it.
        compares_to_reference: Whether it is measured against the full-precision images.

    Raises:
        UserError: if `better` is another word.

    Example:
        >>> TableColumn("psnr", "PSNR, dB", digits=1, better="higher").format_number(31.46)
        '31.5'
    """

    name: str
    title: str
    digits: int = 1
    factor: float = 1.0
    per_image: bool = False
    per_set: bool = False
    better: str | None = None
    compares_to_reference: bool = False

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise UserError(f"column {self.name}: better is higher or lower, not {self.better!r}")

    @property
    def metric(self) -> str:
        """The name without the reference of a set metric."""
        return self.name.partition("/")[0]

    @property
    def csv_keys(self) -> tuple[str, ...]:
        """Names of the CSV columns: the number, and its interval if it has one."""
        if self.per_image or self.per_set:
            return (self.name, f"{self.name}_low", f"{self.name}_high")
        return (self.name,)

    def format_number(self, value: float | int, sign: str = "") -> str:
        """Return a stored value as it is printed. With `sign="+"`, a positive one has a plus."""
        return f"{value * self.factor:{sign}.{self.digits}f}"


def choose_order_column(columns: Sequence[TableColumn]) -> TableColumn | None:
    """Return the metric that orders images from the worst on; None if there is none.

    It is the first metric of single images that compares with full precision, or else the first
    metric of single images. A metric of which neither high nor low is better is left out.
    """
    metrics = [column for column in columns if column.per_image and column.better]
    return min(metrics, key=lambda column: not column.compares_to_reference, default=None)


@dataclass(frozen=True)
class ScoredRow:
    """A label and its numbers, by CSV column; no numbers if the result is missing.

    Attributes:
        label: Label of the row.
        values: Numbers by name.
        group: Name of the group whose rows are compared with each other.
        per_image: Values of each image, by metric.
        images: Prompt and seed of each image, in the order of the values.
        reference: Whether it is full precision, with which the other rows are compared.
        published: Numbers of a paper for this row.
        notes: Remarks on how the scores came about, such as that prompts were cut, by metric.
        about: Definition of each metric.
        differs: How the method differs from its authors' code, in sentences.

    Example:
        >>> row = ScoredRow("GPTQ", {"n": 64, "psnr": 31.4, "psnr_low": 30.9, "psnr_high": 32.0})
        >>> row.measured_names
        ['psnr']
    """

    label: str
    values: Mapping[str, Value]
    group: str | None = None
    per_image: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    images: Sequence[Any] = ()
    reference: bool = False
    published: PublishedResult | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)
    differs: Sequence[str] = ()

    @property
    def measured_names(self) -> list[str]:
        """Names of the numbers that have an interval or a spread over seeds."""
        names = []
        for name in self.values:
            for suffix in ("_low", "_sd"):
                if name.endswith(suffix):
                    names.append(name.removesuffix(suffix))
        return list(dict.fromkeys(names))


def make_scored_row(
    label: str, metrics: Mapping[str, Any], images: Sequence[Any] = (), **fields: Any
) -> ScoredRow:
    """Make a row from the score stage's metrics.json and the generate stage's images.json."""
    values: dict[str, Value] = {"n": metrics["n"], **metrics["scalars"]}
    summaries = dict(metrics["metrics"])
    for name, groups in metrics.get("groups", {}).items():
        for group, summary in groups.items():
            summaries[f"{name}:{group}"] = summary
    for name, summary in summaries.items():
        known = summary or {"mean": None, "low": None, "high": None}
        values[name] = known["mean"]
        values[f"{name}_low"], values[f"{name}_high"] = known["low"], known["high"]
    for key in ("per_image", "notes", "about"):
        fields[key] = metrics.get(key, {})
    return ScoredRow(label, values, images=images, **fields)


def average_over_seeds(rows: Mapping[int, ScoredRow]) -> ScoredRow:
    """Average rows that differ only in the seed. The result has no numbers if one of them has none.

    The values of each image are averaged over seeds, and the interval is over prompts. NAME_sd is
    the standard deviation of the seeds' means.

    Raises:
        ValueError: if the rows do not draw the same prompts.
    """
    first, *others = rows.values()
    if not others:
        return first
    if not all(row.values for row in rows.values()):
        return replace(first, values={}, per_image={}, images=())
    values: dict[str, Value] = {"seeds": len(rows)}
    for name in first.values:
        if not name.endswith(("_low", "_high")):
            by_seed = {seed: row.values.get(name) for seed, row in rows.items()}
            values |= summarize_seeds(name, by_seed, f"{name}_low" in first.values)
    per_image = {}
    for name in first.per_image:
        averages = average_images([row.per_image.get(name, ()) for row in rows.values()])
        per_image[name] = averages
        if averages and None not in averages:
            interval = compute_intervals(np.array([averages]))[0]
            values[name] = interval.mean
            values[f"{name}_low"], values[f"{name}_high"] = interval.low, interval.high
    return replace(first, values=values, per_image=per_image, images=_merge_images(rows))


def _merge_images(rows: Mapping[int, ScoredRow]) -> list[dict[str, Any]]:
    """Return the prompt and the seeds of each image."""
    prompts, seeds = [], []
    for row in rows.values():
        prompts.append([image["prompt"] for image in row.images])
        seeds.append([image["seed"] for image in row.images])
        if prompts[-1] != prompts[0]:
            raise ValueError(f"{row.label}: its seeds drew other prompts")
    merged = []
    for prompt, *image_seeds in zip(prompts[0], *seeds, strict=True):
        merged.append({"prompt": prompt, "seeds": image_seeds})
    return merged


def average_images(seeds: Sequence[Sequence[Value]]) -> list[Value]:
    """Average the values of each image over seeds. The average is None if a seed has no value."""
    averages: list[Value] = []
    for values in zip(*seeds, strict=True):
        known = [value for value in values if value is not None]
        averages.append(fmean(known) if len(known) == len(values) else None)
    return averages


def summarize_seeds(name: str, by_seed: Mapping[int, Value], has_spread: bool) -> dict[str, Value]:
    """Return the mean of a number over seeds, which is None if a seed has no value.

    If `has_spread`, return also NAME_sd, its standard deviation, and NAME_seedN of each seed.
    """
    known = [value for value in by_seed.values() if value is not None]
    complete = len(known) == len(by_seed)
    mean: Value = None
    if complete:
        mean = known[0] if len(set(known)) == 1 else fmean(known)
    if not has_spread:
        return {name: mean}
    summary: dict[str, Value] = {name: mean, f"{name}_sd": stdev(known) if complete else None}
    for seed, value in by_seed.items():
        summary[f"{name}_seed{seed}"] = value
    return summary


def expand_columns(columns: Sequence[TableColumn], rows: Sequence[ScoredRow]) -> list[TableColumn]:
    """Return a column for each name that a metric is stored under.

    The name of a set metric says the reference, the number of images and the filter, such as
    `fid/coco-5000/tf-bilinear`. Values that differ in these are in different columns.
    """
    stored: dict[str, None] = {}
    for row in rows:
        stored.update(dict.fromkeys(row.measured_names))
    expanded = []
    for column in columns:
        prefix = f"{column.name}/"
        names = [name for name in stored if name == column.name or name.startswith(prefix)]
        for name in names or [column.name]:
            title = ", ".join([column.title, *name.split("/")[1:]])
            expanded.append(replace(column, name=name, title=title))
    return expanded
