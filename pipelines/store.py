"""The store as a whole: what is in it, whether it is intact, what can go, and moving it between machines."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import hydra
from omegaconf import DictConfig
from tqdm import tqdm

from fp4dit import archive
from fp4dit.errors import UserError
from fp4dit.locks import held, holder
from fp4dit.store import Store
from fp4dit.stored import Stored
from pipelines.command import command
from pipelines.garbage import collect
from pipelines.made import told
from pipelines.naming import named, stages
from pipelines.resolvers import CONF, nearest
from pipelines.units import aligned, size


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="store")
def main(cfg: DictConfig) -> None:
    if cfg.do not in DO:
        raise UserError(f"there is no {cfg.do!r}; {nearest(cfg.do, list(DO))}")
    DO[cfg.do](cfg, Store(Path(cfg.outputs) / "store", f"store {cfg.do}"))


def ls(cfg: DictConfig, store: Store) -> None:
    """By stage: key, size, when and how it was made."""
    found = named(cfg.what, cfg, store)
    for stage in dict.fromkeys(one.stage for one in found):
        its = [one for one in found if one.stage == stage]
        print(f"{stage}: {len(its)} of {size(total(its)) or '0 MB'}", *(f"  {line}" for line in lines(its)), sep="\n")
    print(f"{len(found)} entries of {size(total(found)) or '0 MB'} in {store.root}")


def lines(its: Sequence[Stored]) -> list[str]:
    how = told(its)
    return aligned([(one.key, size(one.bytes), *(state(one) if one.is_draft else how[one.key])) for one in its])


def state(draft: Stored) -> tuple[str, str, str]:
    who = holder(draft.lock) if held(draft.lock) else None
    return "draft", "", f"being made by {who}" if who else "of a job that ended early; the next goes on there"


def total(found: Sequence[Stored]) -> int:
    return sum(one.bytes for one in found)


def verify(cfg: DictConfig, store: Store) -> None:
    found = [one for one in named(cfg.what, cfg, store) if not one.is_draft]
    damaged = []
    with progress("verify", found) as bar:
        for one in found:
            bad = store.damaged(one.path)
            damaged += [f"{one.name}/{name}" for name in bad]
            bar.update(one.bytes)
    if damaged:
        raise UserError(
            "\n".join(
                [f"{len(damaged)} damaged:", *damaged, "The run that needs one makes it again: give its command."]
            )
        )
    print(f"{len(found)} entries of {size(total(found)) or '0 MB'} are intact")


def progress(label: str, found: Sequence[Stored]) -> tqdm:
    every = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(desc=label, total=total(found), unit="B", unit_scale=True, mininterval=every, delay=every)


def export(cfg: DictConfig, store: Store) -> None:
    found = [one for one in named(cfg.what, cfg, store) if not one.is_draft]
    if not cfg.out:
        raise UserError("where to? Give out=file.tar")
    if not found:
        raise UserError(f"there is nothing of that in {store.root}")
    with progress("export", found) as bar:
        archive.export(found, store, Path(cfg.out), bar.update)
    print(f"{cfg.out}: {len(found)} entries of {size(total(found))}")


def load(cfg: DictConfig, store: Store) -> None:
    if not cfg.what:
        raise UserError("which archive? Give its name: python -m pipelines.store import file.tar")
    for name in cfg.what:
        if not Path(name).is_file():
            raise UserError(f"there is no file at {name}")
        found = archive.load(Path(name), store, stages())
        for entry, new in found.items():
            print(f"{entry}  {'added' if new else 'was there'}")


DO: Mapping[str, Callable[[DictConfig, Store], None]] = {
    "ls": ls,
    "verify": verify,
    "gc": collect,
    "export": export,
    "import": load,
}


def worded(arguments: Sequence[str]) -> Iterator[str]:
    """As Hydra takes them: of words without = the first is what to do, the others are what to do it with."""
    plain = [given for given in arguments if "=" not in given and not given.startswith("-")]
    yield from (given for given in arguments if given not in plain)
    if plain:
        yield f"do={plain[0]}"
    if plain[1:]:
        yield "what=[" + ",".join(f"'{quoted(word)}'" for word in plain[1:]) + "]"


def quoted(word: str) -> str:
    return word.replace("\\", "\\\\").replace("'", "\\'") if "'" in word else word


if __name__ == "__main__":
    sys.argv[1:] = worded(sys.argv[1:])
    command(main)()
