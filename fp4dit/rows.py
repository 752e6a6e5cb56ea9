"""What a table is made of: columns, and rows of numbers from what the score stage left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np

from fp4dit.errors import UserError
from fp4dit.published import Published
from fp4dit.statistics import intervals

Value = float | int | None


@dataclass(frozen=True)
class Column:
    """A number and how it is printed: `value * factor` with `digits` decimals.

    `interval` is true of means over images, which have a `_low` and a `_high` beside them, and `of_set` of scores that
    a set of images has as a whole, which have them too. `better` is "higher" or "lower" where rows may be compared.
    `compares` is true of what is measured against the full-precision image.

    Raises:
        UserError: if `better` is another word.
    """

    name: str
    title: str
    digits: int = 1
    factor: float = 1.0
    interval: bool = False
    of_set: bool = False
    better: str | None = None
    compares: bool = False

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise UserError(f"column {self.name}: better is higher or lower, not {self.better!r}")

    @property
    def metric(self) -> str:
        """Its name without what a score of a set is measured against."""
        return self.name.partition("/")[0]

    @property
    def keys(self) -> tuple[str, ...]:
        ends = (f"{self.name}_low", f"{self.name}_high")
        return (self.name, *ends) if self.interval or self.of_set else (self.name,)

    def number(self, value: float | int, sign: str = "") -> str:
        return f"{value * self.factor:{sign}.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """A label and its numbers by CSV column; none at all where the result is missing.

    `images` says which prompt and seed each of `per_image`'s values belongs to. `reference` is true of full precision,
    which others are compared with. `notes` and `about` say of a metric what happened, and what it is.
    """

    label: str
    values: Mapping[str, Value]
    group: str | None = None
    per_image: Mapping[str, Sequence[Value]] = field(default_factory=dict)
    images: Sequence[Any] = ()
    reference: bool = False
    published: Published | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def row(label: str, metrics: Mapping[str, Any], images: Sequence[Any] = (), **given: Any) -> Row:
    """From what the score stage leaves in metrics.json, and the generate stage in images.json."""
    values: dict[str, Value] = {"n": metrics["n"], **metrics["scalars"]}
    groups = metrics.get("groups", {}).items()
    means = metrics["metrics"] | {f"{name}:{group}": mean for name, found in groups for group, mean in found.items()}
    for name, metric in means.items():
        mean = metric or {"mean": None, "low": None, "high": None}
        values |= {name: mean["mean"], f"{name}_low": mean["low"], f"{name}_high": mean["high"]}
    more = {key: metrics.get(key, {}) for key in ("per_image", "notes", "about")}
    return Row(label, values, images=images, **more, **given)


def over_seeds(rows: Mapping[int, Row]) -> Row:
    """One row of those that differ in the seed alone; without numbers if one of them is missing.

    Each image's value is averaged over seeds, and the interval is over prompts; `_sd` is the standard deviation of the
    seeds' means.

    Raises:
        ValueError: if they do not draw the same prompts.
    """
    first, *others = rows.values()
    if not others:
        return first
    if not all(r.values for r in rows.values()):
        return replace(first, values={}, per_image={}, images=())
    prompts, seeds = ([[image[key] for image in r.images] for r in rows.values()] for key in ("prompt", "seed"))
    if any(drawn != prompts[0] for drawn in prompts):
        raise ValueError(f"{first.label}: its seeds drew other prompts")
    images = [{"prompt": prompt, "seeds": drawn} for prompt, *drawn in zip(prompts[0], *seeds, strict=True)]
    per_image = {name: averaged([r.per_image.get(name, ()) for r in rows.values()]) for name in first.per_image}
    values: dict[str, Value] = {"seeds": len(rows)}
    for name in first.values:
        if not name.endswith(("_low", "_high")):
            each = {seed: r.values.get(name) for seed, r in rows.items()}
            values |= spread(name, each, f"{name}_low" in first.values)
    for name, found in per_image.items():
        if found and None not in found:
            over = intervals(np.array([found]))[0]
            values |= {name: over.mean, f"{name}_low": over.low, f"{name}_high": over.high}
    return replace(first, values=values, per_image=per_image, images=images)


def averaged(seeds: Sequence[Sequence[Value]]) -> list[Value]:
    """Image by image; None where a seed has no value."""
    return [None if None in values else fmean(values) for values in zip(*seeds, strict=True)]  # pyright: ignore


def spread(name: str, each: Mapping[int, Value], sampled: bool) -> dict[str, Value]:
    """The mean of a number over seeds, None where one has none; of what is `sampled` its spread and all of them too."""
    known = [value for value in each.values() if value is not None]
    whole = len(known) == len(each)
    mean = (known[0] if len(set(known)) == 1 else fmean(known)) if whole else None
    if not sampled:
        return {name: mean}
    own = {f"{name}_seed{seed}": value for seed, value in each.items()}
    return {name: mean, f"{name}_sd": stdev(known) if whole else None, **own}


def expanded(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """A column for each name that a metric was stored under: a set's score says against what, after how many images and
    by which filter, as `fid/coco-5000/tf-bilinear`, and scores of different ones stand in no column together."""
    found = []
    for column in columns:
        means = dict.fromkeys(n.removesuffix("_low") for r in rows for n in r.values if n.endswith("_low"))
        names = [n for n in means if n == column.name or n.startswith(f"{column.name}/")] or [column.name]
        found += [replace(column, name=n, title=", ".join([column.title, *n.split("/")[1:]])) for n in names]
    return found
