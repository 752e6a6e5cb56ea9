"""What is meant by a word: entries of the store that belong to a stage, an experiment, a table, or have a key."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError
from fp4dit.store import Store
from fp4dit.stored import Stored, contents
from pipelines.plans import Plan, folder, plans
from pipelines.resolvers import CONF, nearest
from pipelines.rows import searchpath, seeded

SHORTEST = 4  # digits of a key that are taken for one


def named(words: Sequence[str], cfg: DictConfig, store: Store) -> list[Stored]:
    """Of what is in the store that which one of the words means; all of it if there are none.

    Raises:
        UserError: if a word means nothing.
    """
    found = contents(store.root)
    means = [meaning(word, cfg, found) for word in words]
    return [one for one in found if not words or any(one.name in names for names in means)]


def meaning(word: str, cfg: DictConfig, found: Sequence[Stored]) -> set[str]:
    stage, _, key = word.rpartition("/")
    if not stage and key in stages():
        return {one.name for one in found if one.stage == key}
    if not stage and key in (known := runs(cfg)):
        return keys(plans(known[key], cfg.outputs, searched()))
    hits = {one.name for one in found if one.key.startswith(key) and one.stage in (stage, stage or one.stage)}
    if len(key) < SHORTEST or not hits:
        there = [*stages(), *runs(cfg), *(one.name for one in found)]
        raise UserError(f"{word!r} is no stage, experiment, table or key that is in the store; {nearest(word, there)}")
    return hits


def keys(planned: Sequence[Plan]) -> set[str]:
    """Of all stages of all that could be planned, as stage/key."""
    return {f"{step.name}/{step.key}" for one in planned for step in one.steps.values()}


def runs(cfg: DictConfig) -> dict[str, list[list[str]]]:
    """What each experiment and each row of each table gives to a run."""
    more, path = list(cfg.overrides), searchpath()
    found = {name: [[f"experiment={name}", *more, *path]] for name, _ in files("experiment")}
    for name, file in files("table"):
        node: Any = OmegaConf.to_container(OmegaConf.load(file))
        own = [[] if cfg.seeds is None else [f"seed={seed}"] for seed in seeded(cfg.seeds)]
        rows = node.get("rows", [])
        found[name] = [[*node.get("base", []), *row["overrides"], *more, *seed, *path] for row in rows for seed in own]
    return found


def files(group: str) -> Iterator[tuple[str, Path]]:
    for root in [CONF, *map(Path, map(folder, searched()))]:
        yield from ((path.stem, path) for path in sorted((root / group).glob("*.yaml")))


def searched() -> list[str]:
    return list(HydraConfig.get().searchpath or ())


def stages() -> list[str]:
    """The names that stages have in any of conf/stages."""
    nodes: list[Mapping[Any, Any]] = [OmegaConf.load(path) for _, path in files("stages")]  # pyright: ignore
    return list(dict.fromkeys(str(name) for node in nodes for name in node))
