"""Data of a report's plots, in the form that its JavaScript reads."""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

import numpy as np

from fp4dit.report.row_data import RowData
from fp4dit.tables.rows import TableColumn
from fp4dit.tables.table import Table


def find_pareto_front(costs: Sequence[float | int], values: Sequence[float | int]) -> list[int]:
    """Return the indices of the points that no other point beats, by ascending cost.

    A point beats another if it costs at most as much, its value is at least as large, and at least
    one of the two differs.
    """
    by_cost = sorted(range(len(costs)), key=lambda i: (costs[i], -values[i]))
    front: list[int] = []
    for i in by_cost:
        if not front:
            front.append(i)
            continue
        last = front[-1]
        if values[i] > values[last] or (costs[i], values[i]) == (costs[last], values[last]):
            front.append(i)
    return front


def make_front_plots(table: Table, costs: Mapping[str, TableColumn]) -> Iterator[dict[str, Any]]:
    """Yield a plot of each quality that rows are compared by against each cost that differs."""
    for quality in table.columns:
        if not quality.better or not (quality.per_image or quality.per_set):
            continue
        sign = -1 if quality.better == "lower" else 1
        for cost in costs.values():
            points = []
            for i in range(len(table.rows)):
                if point := make_front_point(table, i, quality, cost):
                    points.append(point)
            x = [point["x"] for point in points]
            if len(set(x)) > 1:
                yield {
                    "quality": quality.name,
                    "quality_title": quality.title,
                    "cost": cost.name,
                    "cost_title": cost.title,
                    "points": points,
                    "front": find_pareto_front(x, [sign * point["y"] for point in points]),
                }


def make_front_point(
    table: Table, i: int, quality: TableColumn, cost: TableColumn
) -> dict[str, Any] | None:
    """Return the point of a row with its interval, or None if it lacks one of the two numbers."""
    values = table.rows[i].values
    x, y = values.get(cost.name), values.get(quality.name)
    if x is None or y is None or not isfinite(y):
        return None
    point: dict[str, Any] = {"row": i, "x": x * cost.factor, "y": y * quality.factor}
    for end in ("low", "high"):
        value = values.get(f"{quality.name}_{end}")
        point[end] = (y if value is None else value) * quality.factor
    return point


def make_sqnr_plot(row: RowData) -> dict[str, Any] | None:
    """Return the decibels of each layer (row) at each timestep (column).

    A value is None if the layer was not measured at that timestep, or if its error was 0. The plot
    is None if nothing was measured.
    """
    if not row.sqnr:
        return None
    decibels = {}
    for line in row.sqnr:
        decibels[line["layer"], float(line["timestep"])] = float(line["sqnr_db"])
    layers = list(dict.fromkeys(layer for layer, _ in decibels))
    timesteps = sorted({timestep for _, timestep in decibels}, reverse=True)
    values = []
    for layer in layers:
        layer_decibels = [decibels.get((layer, timestep), np.inf) for timestep in timesteps]
        values.append([round(v, 1) if isfinite(v) else None for v in layer_decibels])
    return {"layers": layers, "timesteps": timesteps, "values": values}


def find_sqnr_range(rows: Sequence[RowData]) -> list[float]:
    """Return the ends of the color scale of all rows: 98 % of the SQNR values lie between them."""
    decibels = []
    for row in rows:
        for line in row.sqnr:
            if isfinite(value := float(line["sqnr_db"])):
                decibels.append(value)
    return np.percentile(decibels, [1, 99]).round(1).tolist() if decibels else [0.0, 1.0]


def make_learning_curves(row: RowData) -> list[dict[str, Any]]:
    """Return the error of each unit by step, with four significant digits."""
    curves: dict[str, dict[str, Any]] = {}
    for line in row.curve:
        curve = curves.setdefault(line["unit"], {"unit": line["unit"], "step": [], "error": []})
        curve["step"].append(int(line["step"]))
        curve["error"].append(float(f"{float(line['error']):.4g}"))
    return list(curves.values())
