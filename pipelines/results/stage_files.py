"""Readers of the files of a stage, which may be missing."""

import csv
from pathlib import Path
from typing import Any

from fp4dit.utils.files import read_json


def read_optional_json(folder: Path | None, name: str) -> Any:
    """Return the content of a JSON file, or None if it does not exist."""
    if not folder or not (folder / name).is_file():
        return None
    return read_json(folder / name)


def read_optional_csv(folder: Path | None, name: str) -> list[dict[str, str]]:
    """Return the lines of a CSV file, or none if it does not exist."""
    if not folder or not (folder / name).is_file():
        return []
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def read_loss_curve(folder: Path | None) -> list[dict[str, str]]:
    """Return the losses of a training run as lines of a learning curve; empty without a file."""
    curve = []
    for line in read_optional_csv(folder, "loss.csv"):
        curve.append({"unit": "training", "step": line["batch"], "loss": line["loss"]})
    return curve
