"""Removes from the store what no experiment and no table of conf needs."""

import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig

from fp4dit.locks import free, held, holder
from fp4dit.store import Store, begun, drafted, journal, lock
from fp4dit.stored import Stored, contents, leftovers
from pipelines.made import told
from pipelines.naming import keys, named, runs, searched, stages
from pipelines.plans import plans
from pipelines.units import aligned, size


def collect(cfg: DictConfig, store: Store) -> None:
    """Says what is to go, and removes it unless `dry_run`. What a job holds stays."""
    found = contents(store.root)
    if not found:
        print(f"there is nothing in {store.root}")
        return
    rows = [given for of in runs(cfg).values() for given in of]
    planned = plans(rows, cfg.outputs, searched())
    unknown = {one.model for one in planned if one.problem}  # models of rows of which nobody knows what they need
    needed = keys(planned) | {one.name for one in named(cfg.keep, cfg, store) if cfg.keep}
    spared = related(found, unknown) - needed
    known = stages()  # another version of the program may know more
    busy = in_use(found)
    scope = {one.name for one in named(cfg.what, cfg, store) if one.stage in known}
    going = [one for one in found if one.name in scope - needed - spared and one.key not in busy]
    tell(going, len(spared), [one.problem for one in planned if one.problem])
    if cfg.dry_run:
        print("Nothing was removed: dry_run=false removes it")
        return
    removed = [one for one in going if remove(one)]
    files = sum(tidy(path, key) for path, key in sorted(leftovers(store.root), reverse=True))  # a lock after its notes
    print(f"removed: {len(removed)} entries, and {files} locks and notes of jobs that are gone")


def in_use(found: Sequence[Stored]) -> set[str]:
    """Keys of what those entries are made from that a job is making."""
    making = [begun(one.path) for one in found if one.is_draft and held(one.lock)]
    return {key for about in making for key in about.get("needs", {}).values()}


def related(found: Sequence[Stored], paths: set[str]) -> set[str]:
    """The entries of these models, and all that was made from them."""
    manifests = {one.name: one.manifest for one in found}
    related = {name for name, manifest in manifests.items() if of_model(manifest) in paths}
    while True:
        keys = {name.split("/")[1] for name in related}
        more = {name for name, its in manifests.items() if keys & set(its.get("needs", {}).values())}
        if more <= related:
            return related
        related |= more


def of_model(manifest: Mapping) -> str | None:
    return manifest.get("config", {}).get("model", {}).get("path")


def tell(going: Sequence[Stored], spared: int, problems: Sequence[str]) -> None:
    for text in dict.fromkeys(problems):
        print(f"{problems.count(text)} rows cannot be planned: {text}")
    if spared:
        print(f"{spared} entries stay, for they are of models of such rows, which may need them")
    how = {stage: told([one for one in going if one.stage == stage]) for stage in {one.stage for one in going}}
    if going:
        print(
            "No experiment and no table of conf needs", *(f"  {line}" for line in aligned(lines(going, how))), sep="\n"
        )
    print(f"{len(going)} entries to remove, of {size(sum(one.bytes for one in going)) or '0 MB'}")


def lines(going: Sequence[Stored], how: Mapping[str, Mapping[str, tuple[str, str, str]]]) -> list[tuple[str, ...]]:
    return [
        (one.name, size(one.bytes), *(("draft", "", "") if one.is_draft else how[one.stage][one.key])) for one in going
    ]


def remove(one: Stored) -> bool:
    with free(one.lock) as nobody:
        if not nobody:
            print(f"{one.name} stays: {holder(one.lock) or 'a job'} holds it")
            return False
        shutil.rmtree(one.path)
        if one.is_draft:
            journal(one.path).unlink(missing_ok=True)
    return True


def tidy(path: Path, key: str) -> bool:
    """Removes what jobs leave beside their results, if it is of no use any more, and says whether."""
    out = path.with_name(key or path.name)
    is_lock = path == lock(out)
    if key and (drafted(out).exists() or (is_lock and out.exists()) or held(lock(out))):
        return False
    with free(path) if is_lock else nullcontext(True) as nobody:
        if nobody:
            path.unlink(missing_ok=True)
    return nobody
