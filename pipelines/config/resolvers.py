"""OmegaConf resolvers: hashes of the files that a stage reads, available metrics, and seeds.

The files in a model's folder are a part of the identity of everything that is made from the model.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fp4dit.store.manifest import compute_key, read_cache, write_cache
from fp4dit.utils.errors import UserError
from fp4dit.utils.files import file_sha256
from fp4dit.utils.hub import describe_source, find_weights

# In a checkout, pipelines/conf is a link to the folder conf/ at the top level.
CONF = Path(str(files("pipelines") / "conf")).resolve()

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

SEED_OFFSET = 1_000_000  # more than there are prompts, because each prompt has its own seed

HASHED_SUFFIXES = (".safetensors", ".json", ".txt", ".model")


def hash_content(
    node: str | DictConfig | None,
    marker: str | None = None,
    *others: str | None,
    _root_: DictConfig,
) -> str | DictConfig:
    """Resolve `${content_hash:path}` or `${content_hash:path,marker}`.

    The result is the hash of a file, or of the files in a model's folder; a hub id is returned as
    it is. Checksums are cached in the store by size and modification time, so that large weights
    are read once.

    Args:
        node: A path, or a part of the config, as in `${content_hash:${metrics}}`. For a part of
            the config, the result is the hash of every `path` and `..._path` in it, by name.
        marker: A file that a folder must contain to be a model of the right kind.
        others: Further paths to hash; null ones are ignored.

    Raises:
        UserError: if a path does not exist, or is not such a model.
    """
    if node is None:
        raise UserError("null is neither a file nor a folder: give a path in its place")
    outputs = _root_.get("outputs")
    cache = Path(outputs) / "store" / ".checksums.json" if outputs else None
    read_only = bool(_root_.get("dry_run"))  # a dry run writes nothing
    hash_one = partial(hash_path, cache=cache, read_only=read_only)
    if isinstance(node, str):
        hashes = [hash_one(node, marker)]
        hashes += [hash_one(path, None) for path in others if path]
        return " ".join(hashes)
    paths = sorted(find_paths(node))
    return OmegaConf.create({name: hash_one(path, marker) for name, path in paths})


def find_paths(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the name and the value of every `path` and `..._path` in a part of the config."""
    for key, value in node.items():
        if isinstance(value, DictConfig):
            yield from find_paths(value, f"{prefix}{key}.")
        elif key == "path" and value is not None:
            yield prefix.removesuffix(".") or "path", value
        elif str(key).endswith("_path") and value:
            yield f"{prefix}{key}", value


def hash_required_content(
    node: DictConfig, source: str | None = None, *, _root_: DictConfig
) -> str | DictConfig:
    """Resolve `${required_content_hash:part,source}`.

    This is `content_hash` for files that the user has to download.

    Args:
        node: A part of the config.
        source: A sentence that says where the files come from.

    Raises:
        UserError: with `source`, if a file does not exist.
    """
    check_files_exist(node, source)
    return hash_content(node, _root_=_root_)


def check_files_exist(node: DictConfig, source: str | None) -> None:
    """Raise a UserError that ends with `source` if a file that the node names does not exist."""
    for _, path in find_paths(node):
        if not Path(path).expanduser().exists():
            message = f"there is no file at {path}"
            raise UserError(f"{message}. {source}" if source else message)


def select_available_metrics(
    metrics: DictConfig, *, _root_: DictConfig | None = None
) -> DictConfig:
    """Resolve `${available_metrics:${metrics}}` to the metrics whose weights are on this machine.

    A metric that a preset marks as `optional` is left out if its weights are not available.

    Raises:
        UserError: if the weights of any other metric are not available.
    """
    missing = find_unavailable_metrics(metrics)
    for name, reason in missing.items():
        if not metrics[name].get("optional"):
            command = f"python -m pipelines.fetch metrics={name}"
            raise UserError(f"metrics={name}: {reason}. To get it: {command}")
    available = {}
    for name, node in metrics.items():
        if name not in missing:
            available[name] = {key: value for key, value in node.items() if key != "optional"}
    return OmegaConf.create(available)


def find_unavailable_metrics(metrics: DictConfig) -> dict[str, str]:
    """Return which metrics lack weights, and where the missing weights come from and belong."""
    unavailable = {}
    for name, node in metrics.items():
        missing = [path for _, path in find_paths(node) if find_weights(path) is None]
        if missing:
            unavailable[str(name)] = "; ".join(map(describe_source, missing))
    return unavailable


def hash_path(path: str, marker: str | None, cache: Path | None, read_only: bool) -> str:
    """Return the hash of a file or of a model's folder, or `hub:` and the hub id.

    Raises:
        UserError: if there is nothing at the path, or the folder does not contain `marker`.
    """
    place = find_weights(path)
    if place is None:
        if HUB_ID.fullmatch(path):
            return f"hub:{path}"
        raise UserError(
            f"there is nothing at {path!r}: no such folder or file, and not a hub id (owner/name)"
        )
    if marker and not (place / marker).is_file():
        kind = "a diffusers pipeline" if marker == "model_index.json" else "such a model"
        reason = f"the folder has no {marker}" if place.is_dir() else "this is a file"
        raise UserError(f"{path!r} is not {kind}: {reason}")
    return compute_key(hash_files(place, cache, read_only))


def hash_files(place: Path, cache: Path | None, read_only: bool) -> dict[str, str]:
    """Return the SHA-256 of every file that can change what a model computes, by name.

    Args:
        place: A file, or the folder of a model.
        cache: The file that caches checksums, or None.
        read_only: Leave the cache as it is.
    """
    paths = [place]
    if not place.is_file():
        paths = sorted(path for path in place.rglob("*") if path.suffix in HASHED_SUFFIXES)
    known = read_cache(cache)
    hashes, new = {}, {}
    for path in paths:
        stat = path.stat()
        state = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if state not in known:
            new[state] = file_sha256(path)
        hashes[path.relative_to(place).as_posix()] = known.get(state) or new[state]
    if cache and new and not read_only:
        write_cache(cache, {**known, **new})
    return hashes


def offset_seed(first: int, _root_: DictConfig) -> int:
    """Resolve `${offset_seed:42}`: 42 plus an offset that is large and grows with `seed`.

    With `seed=0` the result is 42. Other values of `seed` give seeds that are far away.
    """
    seed = _root_.get("seed", 0)
    if not isinstance(seed, int):
        value = "null" if seed is None else seed
        raise UserError(f"seed={value}: give a whole number, such as 0")
    return first + SEED_OFFSET * seed


def remove_key(node: DictConfig, key: str) -> DictConfig:
    """Resolve `${without:${group},key}` to a group of options without one that changes nothing."""
    return OmegaConf.create({name: value for name, value in node.items() if name != key})


def set_key(node: DictConfig, key: str, value: Any) -> DictConfig:
    """Resolve `${with_option:${group},key,value}` to a group with another value of an option.

    Raises:
        UserError: if the group has no such option.
    """
    if key not in node:
        kind = str(node.get("_target_", "this")).rpartition(".")[2]
        raise UserError(f"{kind} has no option {key}: stages=experts is for model=generic")
    return OmegaConf.create({**node, key: value})


def list_options(group: str) -> list[str]:
    """Return the names of a config group's options. A file `_NAME.yaml` is not an option."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    return [name for name in names if not name.startswith("_")]


def format_options(group: str, width: int = 46) -> str:
    """Resolve `${options:group}`, for help pages, to the first of the group's options.

    Args:
        group: The name of the group.
        width: The number of characters that the result may have.

    Returns:
        As many names as fit, and the number of all options if some do not fit.
    """
    names = list_options(group)
    text = ", ".join(names)
    shown = len(names)
    while len(text) > width and shown > 1:
        shown -= 1
        text = f"{', '.join(names[:shown])}, ... ({len(names)})"
    return text


def suggest_names(name: str, names: Sequence[str]) -> str:
    """Return what to say after an unknown name: the nearest known names, or else all of them."""
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if nearest:
        return f"did you mean {' or '.join(nearest)}?"
    return f"there are {', '.join(name for name in names if '.' not in name)}"


# Resolvers whose results depend on files, which may change while no config changes.
FILE_RESOLVERS = {
    "content_hash": hash_content,
    "required_content_hash": hash_required_content,
    "available_metrics": select_available_metrics,
}


def register_resolvers() -> None:
    """Register all resolvers with OmegaConf."""
    others = {
        "offset_seed": offset_seed,
        "options": format_options,
        "with_option": set_key,
        "without": remove_key,
    }
    for name, resolver in {**FILE_RESOLVERS, **others}.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
