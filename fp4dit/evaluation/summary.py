"""Summary of the scores of a set of images: means, intervals, groups, values and notes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from torch import Tensor

from fp4dit.evaluation.score import feature_key
from fp4dit.metrics.base import ImageMetric, PerImageMetric, SetMetric
from fp4dit.utils.statistics import compute_interval

Metrics = Mapping[str, ImageMetric]

# The mean of a metric and the ends of its interval: `mean`, `low` and `high`.
Summary = dict[str, float] | None


def split_metrics(metrics: Metrics) -> tuple[dict[str, PerImageMetric], dict[str, SetMetric]]:
    """Return the metrics of each image, and the metrics of the set, by name."""
    per_image: dict[str, PerImageMetric] = {}
    per_set: dict[str, SetMetric] = {}
    for name, metric in metrics.items():
        if isinstance(metric, PerImageMetric):
            per_image[name] = metric
        elif isinstance(metric, SetMetric):
            per_set[name] = metric
    return per_image, per_set


def summarize_scores(
    metrics: Metrics, scores: Mapping[str, Tensor], images: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of metrics.json, without `scalars`.

    Args:
        metrics: The metrics by name.
        scores: The values and features of all images, from `load_shards`.
        images: The `prompt`, the `seed` and optionally the `group` of each image.
    """
    per_image, per_set = split_metrics(metrics)
    values = {name: scores[name].tolist() for name in per_image}
    prompts = [entry["prompt"] for entry in images]
    groups = [entry.get("group") for entry in images]
    summaries: dict[str, Summary] = {}
    group_summaries, notes, about = {}, {}, {}
    for name, metric in per_image.items():
        summaries[name] = summarize_values(values[name])
        group_summaries[name] = summarize_groups(values[name], groups)
        about[name] = metric.about
        if note := metric.describe_cut_prompts(prompts):
            notes[name] = note
    for name, metric in per_set.items():
        stored_name = metric.stored_name(name, len(images))
        summaries[stored_name] = asdict(metric.estimate(*select_features(metric, scores)))
        about[stored_name] = metric.about
    return {
        "n": len(images),
        "metrics": summaries,
        "groups": group_summaries,
        "notes": notes,
        "about": about,
        "per_image": {name: _replace_infinite(numbers) for name, numbers in values.items()},
    }


def select_features(
    metric: SetMetric, scores: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the features that a metric reads of the images, and those of the reference, if any."""

    def select_side(side: str) -> dict[str, Tensor]:
        return {
            layer: scores[feature_key(metric.extractor, layer, side)] for layer in metric.layers
        }

    reference = select_side("reference") if metric.compares_to_reference else None
    return select_side("images"), reference


def summarize_values(values: Sequence[float]) -> Summary:
    """Return the mean and its interval, or None if a value is infinite, as PSNR can be."""
    return asdict(compute_interval(values)) if all(map(isfinite, values)) else None


def summarize_groups(values: Sequence[float], groups: Sequence[str | None]) -> dict[str, Summary]:
    """Return the summary of each group of images, such as a style of prompts."""
    values_by_group: dict[str, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if group is not None:
            values_by_group.setdefault(group, []).append(value)
    return {group: summarize_values(numbers) for group, numbers in values_by_group.items()}


def _replace_infinite(values: Sequence[float]) -> list[float | None]:
    return [value if isfinite(value) else None for value in values]
