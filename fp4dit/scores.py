"""What is kept of the scores of a set of images: means, intervals, per-image values, and what a reader has to know."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from torch import Tensor

from fp4dit.metrics.base import PerImage, PerSet
from fp4dit.statistics import interval
from fp4dit.tasks.score import feature

Metrics = Mapping[str, PerImage | PerSet]
Summary = dict[str, float] | None


def split(metrics: Metrics) -> tuple[dict[str, PerImage], dict[str, PerSet]]:
    """Those of each image, and those of the set, by name."""
    each = {name: metric for name, metric in metrics.items() if isinstance(metric, PerImage)}
    return each, {name: metric for name, metric in metrics.items() if not isinstance(metric, PerImage)}


def report(metrics: Metrics, found: Mapping[str, Tensor], drawn: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`found` is what the shards hold; `drawn` says of each image its prompt, seed and, if there are any, group."""
    each, whole = split(metrics)
    values = {name: found[name].tolist() for name in each}
    sets = {metric.label(name, len(drawn)): metric for name, metric in whole.items()}
    prompts = [entry["prompt"] for entry in drawn]
    notes = {name: metric.note(prompts) for name, metric in each.items()}
    return {
        "n": len(drawn),
        "metrics": {name: summary(v) for name, v in values.items()}
        | {label: asdict(metric.report(*features(metric, found))) for label, metric in sets.items()},
        "groups": {name: by_group(v, [entry.get("group") for entry in drawn]) for name, v in values.items()},
        "notes": {name: note for name, note in notes.items() if note},
        "about": {name: metric.about for name, metric in [*each.items(), *sets.items()]},
        "per_image": {name: [v if isfinite(v) else None for v in numbers] for name, numbers in values.items()},
    }


def features(metric: PerSet, found: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    read = lambda side: {layer: found[feature(metric.extractor, layer, side)] for layer in metric.layers}
    return read("images"), read("reference") if metric.compares else None


def summary(values: Sequence[float]) -> Summary:
    """A mean and its interval; None if a value is infinite, as an image's PSNR against itself."""
    return asdict(interval(values)) if all(map(isfinite, values)) else None


def by_group(values: Sequence[float], groups: Sequence[str | None]) -> dict[str, Summary]:
    """The summary of each group, as of a style of prompts; nothing where there are no groups."""
    names = dict.fromkeys(group for group in groups if group is not None)
    return {name: summary([v for v, g in zip(values, groups, strict=True) if g == name]) for name in names}
