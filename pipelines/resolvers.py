"""Interpolations of our own: what lies in a model's folder is part of the identity of what is made from it."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fp4dit.errors import UserError
from fp4dit.store import checksum, fingerprint, remember, remembered
from fp4dit.weights import advice, find

CONF = Path(__file__).parents[1] / "conf"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
APART = 1_000_000  # more seeds than there are prompts, each of which has its own
WEIGHTS_AND_CONFIGS = (".safetensors", ".json", ".txt", ".model")


def content(
    node: str | DictConfig | None, marker: str | None = None, *others: str | None, _root_: DictConfig
) -> str | DictConfig:
    """`${content:path}` or `${content:path,marker}`: hash of a file, or of the files in a model's folder.

    A hub id stands for itself. `marker` is the file by which a folder is known to be the right kind of model; what
    `others` there are, besides null, is hashed too. Given a part of the config, `${content:${metrics}}`, the same for
    every `path` and `..._path` in it. Checksums are kept by size and mtime in the store, so that large weights are read
    once.

    Raises:
        UserError: if there is nothing there, or it is not such a model.
    """
    if node is None:
        raise UserError("null is no file or folder: give a path in its place")
    outputs = _root_.get("outputs")
    dry = _root_.get("dry_run")  # which remembers nothing either
    memory = Path(outputs) / "store" / ".checksums.json" if outputs and not dry else None
    if isinstance(node, str):
        return " ".join([of_path(node, marker, memory), *(of_path(path, None, memory) for path in others if path)])
    return OmegaConf.create({name: of_path(path, marker, memory) for name, path in sorted(paths(node))})


def paths(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        if isinstance(value, DictConfig):
            yield from paths(value, f"{prefix}{key}.")
        elif key == "path" and value is not None:
            yield prefix.removesuffix(".") or "path", value
        elif str(key).endswith("_path") and value:
            yield f"{prefix}{key}", value


def fetched(node: DictConfig, source: str | None = None, *, _root_: DictConfig) -> str | DictConfig:
    """`${fetched:part,source}`: `content` of files that whoever runs this has to fetch; `source` says from where."""
    require(node, source)
    return content(node, _root_=_root_)


def require(node: DictConfig, source: str | None) -> None:
    """Raises UserError, which ends with `source`, if a file that the node names is not there."""
    for _, path in paths(node):
        if not Path(path).expanduser().exists():
            raise UserError(". ".join(filter(None, [f"there is no file at {path}", source])))


def present(metrics: DictConfig) -> DictConfig:
    """`${present:${metrics}}`: those whose weights are here. What a preset brings along is `optional`, and left out
    where they are not.

    Raises:
        UserError: if one is asked for by name.
    """
    missing = absent(metrics)
    for name in missing:
        if not metrics[name].get("optional"):
            raise UserError(f"metrics={name}: {missing[name]}. To get it: python -m pipelines.fetch metrics={name}")
    here = {name: dict(node) for name, node in metrics.items() if name not in missing}
    return OmegaConf.create({name: {k: v for k, v in node.items() if k != "optional"} for name, node in here.items()})


def absent(metrics: DictConfig) -> dict[str, str]:
    """What is missing of each metric whose weights are not all here."""
    specs = {str(name): [path for _, path in paths(node)] for name, node in metrics.items()}
    lacking = {name: [advice(path) for path in found if find(path) is None] for name, found in specs.items()}
    return {name: "; ".join(told) for name, told in lacking.items() if told}


def of_path(path: str, marker: str | None, memory: Path | None) -> str:
    place = find(path)
    if place is None:
        if HUB_ID.fullmatch(path):
            return f"hub:{path}"
        raise UserError(f"there is nothing at {path!r}: no such folder or file, and no hub id (owner/name)")
    if marker and not (place / marker).is_file():
        kind = "a diffusers pipeline" if marker == "model_index.json" else "such a model"
        what = f"the folder has no {marker}" if place.is_dir() else "this is a file"
        raise UserError(f"{path!r} is not {kind}: {what}")
    return fingerprint(checksums(place, memory))


def checksums(place: Path, memory: Path | None) -> dict[str, str]:
    """SHA-256 of every file that can change what the model computes, by name."""
    known, found, fresh = remembered(memory), {}, {}
    for path in [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in WEIGHTS_AND_CONFIGS):
        stat = path.stat()
        state = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if state not in known:
            fresh[state] = checksum(path)
        found[path.relative_to(place).as_posix()] = known.get(state) or fresh[state]
    if memory and fresh:
        remember(memory, {**known, **fresh})
    return found


def seeded(first: int, _root_: DictConfig) -> int:
    """`${seeded:42}`: the first of the seeds that follow 42 where `seed` is 0, far from those of every other `seed`."""
    if not isinstance(seed := _root_.get("seed", 0), int):  # null, which what is nothing yet may be
        raise UserError(f"seed={'null' if seed is None else seed}: a whole number is wanted here, such as 0")
    return first + APART * seed


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def nearest(name: str, names: list[str]) -> str:
    """What to say after an unknown name: the closest known ones first, else all."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(name for name in names if '.' not in name)}"


# Those whose answers depend on files, which may change while no config does.
LOOKING = {"content": content, "fetched": fetched, "present": present}


def register() -> None:
    others = {"seeded": seeded, "options": lambda group: ", ".join(options(group))}
    for name, resolver in {**LOOKING, **others}.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
