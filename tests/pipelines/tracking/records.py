"""Records of W&B runs, read back from the file of an offline run."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipelines.tracking.wandb import WandbView

# The field of a record that holds its content.
FIELDS = {"history": "item", "summary": "update"}

Records = list[dict[str, Any]]


def read_records(root: Path) -> Records:
    """Return the records in the file of the only offline run below a folder."""
    (file,) = root.glob("wandb/offline-run-*/*.wandb")
    command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", file]
    inspection = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in inspection.stdout.splitlines()]


def select_records(records: Records, kind: str) -> Records:
    """Return the items of the history, or the updates of the summary."""
    field = FIELDS[kind]
    selected = []
    for record in records:
        if record["type"] == kind and field in record[kind]:
            selected.append(record[kind][field])
    return selected


def merge_summary(records: Records) -> dict[str, Any]:
    """Return the summary after all updates."""
    summary = {}
    for update in select_records(records, "summary"):
        summary |= update
    return summary


def find_run(records: Records) -> dict[str, Any]:
    """Return the record that describes the run."""
    [run] = (record["run"] for record in records if record["type"] == "run")
    return run


def make_view(tmp_path: Path, **changes: Any) -> WandbView:
    options = {
        "mode": "offline",
        "dir": str(tmp_path),
        "group": "demo",
        "job_type": "fp4dit",
        "name": "a=1",
        "images": 4,
    }
    return WandbView("fp4dit", **{**options, **changes})
