"""A value is of the kind that it stands in place of: a number for a number, a list for a list."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
        if before is not None and now is not None and not fits(now, before):
            shown = f", such as {before}" if isinstance(before, bool | int | float | str) and before != "" else ""
            raise UserError(f"{single[key]}: {KINDS[kind(before)]} is wanted here{shown}")


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
