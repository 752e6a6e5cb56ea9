"""The data of a report's plots, as JSON can hold it."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from fp4dit.report.material import Material
from fp4dit.rows import Column
from fp4dit.tables import Table

COSTS = ("bit_operations", "bits_weight", "bits_activation", "checkpoint_bytes", "calibration_seconds")


def pareto(costs: Sequence[float | int], values: Sequence[float | int]) -> list[int]:
    """Which points no other beats: none costs at most as much and is worth at least as much, one of both truly. By
    ascending cost; what counts is that `values` are large."""
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    front: list[int] = []
    for i in order:
        if not front or values[i] > values[front[-1]] or (costs[i], values[i]) == (costs[front[-1]], values[front[-1]]):
            front.append(i)
    return front


def fronts(table: Table, costs: Mapping[str, Column]) -> Iterator[dict[str, Any]]:
    """Each quality that rows are compared by, against each cost in which they differ."""
    for quality in (c for c in table.columns if c.better and (c.interval or c.of_set)):
        for cost in (costs[name] for name in COSTS if name in costs):
            points = [point for i in range(len(table.rows)) if (point := placed(table, i, quality, cost))]
            if len({point["x"] for point in points}) > 1:
                sign = -1 if quality.better == "lower" else 1
                best = pareto([point["x"] for point in points], [sign * point["y"] for point in points])
                named = {"quality": quality.name, "quality_title": quality.title}
                yield {**named, "cost": cost.name, "cost_title": cost.title, "points": points, "front": best}


def placed(table: Table, i: int, quality: Column, cost: Column) -> dict[str, Any] | None:
    values = table.rows[i].values
    x, y = values.get(cost.name), values.get(quality.name)
    if x is None or y is None or not isfinite(y):
        return None
    ends = (values.get(f"{quality.name}_{end}") for end in ("low", "high"))
    low, high = (y if end is None else end for end in ends)
    scaled = {"y": y, "low": low, "high": high}
    return {"row": i, "x": x * cost.factor} | {name: value * quality.factor for name, value in scaled.items()}


def sqnr(material: Material) -> dict[str, Any] | None:
    """Layers by timesteps; None where nothing was lost, or nothing measured."""
    if not material.sqnr:
        return None
    layers = list(dict.fromkeys(line["layer"] for line in material.sqnr))
    timesteps = sorted({float(line["timestep"]) for line in material.sqnr}, reverse=True)
    found = {(line["layer"], float(line["timestep"])): float(line["sqnr_db"]) for line in material.sqnr}
    values = [
        [round(v, 1) if isfinite(v := found.get((name, t), np.inf)) else None for t in timesteps] for name in layers
    ]
    return {"layers": layers, "timesteps": timesteps, "values": values}


def span(materials: Sequence[Material]) -> list[float]:
    """Between which decibels almost all of all rows lie, so that they share their colours."""
    found = [v for m in materials for line in m.sqnr if isfinite(v := float(line["sqnr_db"]))]
    return np.percentile(found, [1, 99]).round(1).tolist() if found else [0.0, 1.0]


def curves(material: Material) -> list[dict[str, Any]]:
    units = dict.fromkeys(line["unit"] for line in material.curve)
    lines = {unit: [line for line in material.curve if line["unit"] == unit] for unit in units}
    return [
        {
            "unit": unit,
            "step": [int(p["step"]) for p in points],
            "error": [float(f"{float(p['error']):.4g}") for p in points],
        }
        for unit, points in lines.items()
    ]
