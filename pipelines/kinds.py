"""A value is of the kind that it stands in place of: a number for a number, a list for a list."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from types import NoneType
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4dit.errors import UserError
from pipelines.resolvers import CONF

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (a number that is meant as text wants quotes: '\"1\"')",
    list: "a list",
    dict: "several options, not one value",
}


def check_kinds(cfg: DictConfig, overrides: Sequence[str], name: str = "run") -> None:
    """Of what was given on the command line for single options. What has no value to begin with may get any.

    Raises:
        UserError: at the first that is of another kind.
    """
    given = {text.partition("=")[0]: text for text in overrides if "=" in text and text[0] not in "+~"}
    groups = {key for key in given if (CONF / key).is_dir() or key.startswith("hydra") or "@" in key}
    single = {key: text for key, text in given.items() if key not in groups}
    if not single:
        return
    usual = compose(name, [text for text in overrides if text not in single.values()])
    for key in single:
        before, now = (value(config, key) for config in (usual, cfg))
        if before is not None and not (fits(now, before) if now is not None else kind(before) is not list):
            shown = f", such as {before}" if isinstance(before, bool | int | float | str) and before != "" else ""
            raise UserError(f"{single[key]}: {KINDS[kind(before)]} is wanted here{shown}")


WHOLE_TOO = BeartypeConf(is_pep484_tower=True)  # where a float is wanted


def misfit(node: Any, name: str = "") -> str | None:
    """What is said of the first plain value in a config that its place, by the annotation of the parameter that it is
    given to, does not take; None if there is none."""
    if isinstance(node, list):
        return next(filter(None, (misfit(item, f"{name}.{i}") for i, item in enumerate(node))), None)
    if not isinstance(node, Mapping):
        return None
    hints = annotations(node["_target_"]) if "_target_" in node else {}
    for key, own in node.items():
        path = f"{name}.{key}" if name else key
        if key in hints and plain(own) and not is_bearable(own, hints[key], conf=WHOLE_TOO):
            wanted = " or ".join(shown(hint) for hint in get_args(hints[key]) or [hints[key]])
            return f"{path}={'null' if own is None else own}: {wanted} is wanted here"
        if found := misfit(own, path):
            return found
    return None


def annotations(target: Any) -> dict[str, Any]:
    """Of its parameters; none if there is no such thing, or nobody can tell."""
    try:
        made = resolve_name(target)
        return get_type_hints(made.__init__ if isinstance(made, type) else made)
    except (ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}


def plain(own: Any) -> bool:
    """Whether nothing is to be made of it."""
    inside = own.values() if isinstance(own, Mapping) else own if isinstance(own, list) else ()
    return not (isinstance(own, Mapping) and "_target_" in own) and all(map(plain, inside))


def shown(hint: Any) -> str:
    return "null" if hint is NoneType else KINDS.get(hint) or getattr(hint, "__name__", str(hint))


def value(config: DictConfig, key: str) -> Any:
    """None too where it cannot be known yet."""
    try:
        return OmegaConf.select(config, key)
    except (OmegaConfBaseException, UserError):
        return None


def kind(found: Any) -> type:
    if OmegaConf.is_config(found):
        return dict if OmegaConf.is_dict(found) else list
    return type(found)


def fits(now: Any, before: Any) -> bool:
    return kind(now) in ((int, float) if kind(before) is float else (kind(before),)) or kind(before) not in KINDS


def check_finite(stage: str, identity: Mapping[str, Any]) -> None:
    """Raises UserError if a number is infinite or none, of which no identity can be made."""
    for name, found in leaves(identity):
        if isinstance(found, float) and not math.isfinite(found):
            raise UserError(f"{name}={found} of the stage {stage}: give a finite number")


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in mappings and lists, by the names and positions that lead there."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, found in items:
        if isinstance(found, dict | list):
            yield from leaves(found, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", found
