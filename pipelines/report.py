"""Write a table as one HTML page, from the store alone."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fp4dit.provenance import commit, versions
from fp4dit.report.album import Album, Limits
from fp4dit.report.material import Material, Stage
from fp4dit.report.page import page
from fp4dit.report.plots import COSTS
from fp4dit.rows import Column
from fp4dit.store import Store, whole
from fp4dit.tables import Table
from pipelines.command import command
from pipelines.missing import line, make
from pipelines.plan import Step
from pipelines.resolvers import CONF
from pipelines.rows import Asked, Entry, asked
from pipelines.table import chosen, given, tabulated
from pipelines.units import size
from pipelines.view import read_csv, read_json, read_losses

# What a page is made of, and which files of it are read; of those that are not named here, all.
READ = {
    "reconstruct": ("curve.csv", "blocks.json"),
    "activate": ("sqnr.csv",),
    "histograms": ("histograms.json",),
    "trained": ("loss.csv",),
    "plain": ("loss.csv",),
}
UNREAD = ("capture", "export")


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="report")
def main(cfg: DictConfig) -> None:
    store, name = Store(Path(cfg.outputs) / "store"), HydraConfig.get().runtime.choices["table"]
    limits = Limits(**cfg.report)
    rows, columns = asked(cfg, name), chosen(cfg, name)
    lacking = [full for row in rows if (full := completed(shown(row), store)) is not None]
    failed = make(lacking, cfg.jobs, Path(cfg.outputs) / "runs") if cfg.run_missing else []
    table = tabulated(cfg, rows, columns, store)
    materials = [material(row, store) for row in rows]
    out = Path(cfg.outputs) / "reports" / f"{name}.html"
    with whole(out) as part, open(part, "w", encoding="utf-8") as file:
        album = Album(materials, limits, **worst_by(table))
        again = line("report", *given(), "run_missing=true", "jobs=2") if any(m.fill for m in materials) else ""
        file.writelines(page(name, table, materials, album, costs(cfg), again, made(store, rows)))
    print(f"{out} ({size(out.stat().st_size)})")
    incomplete = [m for m in materials if m.fill]
    if incomplete:
        print(f"It lacks something of {len(incomplete)} of {len(rows)} rows. To make all of it:\n  {again}")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(rows)} rows failed: {'; '.join(failed)}. Why stands above.")


def shown(row: Asked) -> Entry:
    """Of several seeds the first is looked at."""
    return next(iter(row.entries.values()))


def needed(entry: Entry) -> list[Step]:
    """The stages of which a page shows something."""
    return [step for step in entry.steps.values() if step.name not in UNREAD]


def completed(entry: Entry, store: Store) -> Entry | None:
    """The run that makes what is missing of an entry; None if nothing is."""
    todo = [step.name for step in needed(entry) if there(step, store) is None]
    if entry.steps and not todo:
        return None
    targets = [f"targets=[{','.join(todo)}]"] if todo else []
    return replace(entry, arguments=[*entry.arguments, *targets])


def there(step: Step, store: Store) -> Path | None:
    files = ("manifest.json",) if step.name in UNREAD else READ.get(step.name, ())
    return store.find(step.name, step.key, *files)


def state(step: Step, store: Store) -> str:
    if there(step, store):
        return "in the store"
    if store.path(step.name, step.key).exists():
        return "damaged"
    older = sorted(versions_of(step, store))
    return f"missing; of version {older[-1]} there is one, this is {step.identity['version']}" if older else "missing"


def versions_of(step: Step, store: Store) -> set[int]:
    """Other versions of a stage that was given the same."""
    found = set()
    for path in (store.root / step.name).glob("*/manifest.json"):
        try:
            config = json.loads(path.read_text())["config"]
        except (OSError, ValueError, KeyError):
            continue
        if {key: value for key, value in config.items() if key not in ("version", "content")} == step.config:
            found.add(config.get("version"))
    return found - {step.identity.get("version"), None}


def material(row: Asked, store: Store) -> Material:
    entry = shown(row)
    fill = completed(entry, store)
    of = lambda role: entry.find(entry.steps["score"].needs[role], store) if entry.steps else None
    folder = {name: there(entry.steps[name], store) if name in entry.steps else None for name in READ}
    losses = read_losses(folder["trained"] if "trained" in entry.steps else folder["plain"])
    return Material(
        entry.row(store, row.bare),
        line("run", *entry.arguments),
        OmegaConf.to_yaml({step.name: dict(step.config) for step in entry.steps.values()}),
        [Stage(step.name, step.key, state(step, store)) for step in entry.steps.values()],
        line("run", *fill.arguments) if fill else "",
        entry.plan.problem,
        of("images"),
        of("reference"),
        read_csv(folder["activate"], "sqnr.csv"),
        read_csv(folder["reconstruct"], "curve.csv") or [{**line, "error": line["loss"]} for line in losses],
        read_json(folder["reconstruct"], "blocks.json") or (),
        read_json(folder["histograms"], "histograms.json"),
    )


def worst_by(table: Table) -> dict[str, Any]:
    """By what of too many images the worst are chosen."""
    found = next((c for c in sorted(table.columns, key=lambda c: not c.compares) if c.interval and c.better), None)
    return {"worst_by": found.name, "higher_is_better": found.better == "higher"} if found else {}


def costs(cfg: DictConfig) -> dict[str, Column]:
    known: Any = {**cfg.others, **cfg.columns}
    return {name: Column(name, **known[name]) for name in COSTS if name in known}


def made(store: Store, rows: Sequence[Asked]) -> str:
    """When, and by which code."""
    scores = [folder for row in rows for e in row.entries.values() if (folder := e.find("score", store))]
    days = sorted(json.loads((folder / "manifest.json").read_text())["created"][:10] for folder in scores)
    when = f"Scored {days[0]}{f' to {days[-1]}' if days[-1] != days[0] else ''}. " if days else ""
    return f"{when}Page by FP4DiT {versions().get('fp4dit', '')}, {commit() or 'no commit known'}."


if __name__ == "__main__":
    command(main)()
