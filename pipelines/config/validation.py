"""Checks of the values in a config: types, finite numbers, and secrets.

An override must have the type of the default that it replaces, and an argument the type that its
class annotates. All checks give a message that names the option.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from types import NoneType
from typing import Any, get_args, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4dit.utils.errors import UserError
from pipelines.config.compose import compose_config
from pipelines.config.resolvers import CONF

TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text (put a number that is meant as text in quotes: '\"1\"')",
    list: "a list",
    dict: "several options, not one value",
}

# The groups whose options contain specs, such as `format: e2m1`, and the keys of the specs.
SPEC_GROUPS = ("weight", "activation", "text_encoder")
SPEC_KEYS = ("format", "granularity", "scale", "observer", "dtype", "inner", "match")

# Accept a whole number where a float is annotated.
INT_AS_FLOAT = BeartypeConf(is_pep484_tower=True)


def check_override_types(cfg: DictConfig, overrides: Sequence[str], name: str = "run") -> None:
    """Check the type of each override of a single option.

    An option whose default is null may get a value of any type.

    Args:
        cfg: The composed config.
        overrides: The overrides that it was composed with.
        name: The name of the root config.

    Raises:
        UserError: if the type of an override is not that of the default which it replaces.
    """
    texts = {}
    for text in overrides:
        key = text.partition("=")[0]
        if "=" in text and text[0] not in "+~" and not _names_group(key) and not _holds_spec(key):
            texts[key] = text
    if not texts:
        return
    defaults = compose_config(name, [text for text in overrides if text not in texts.values()])
    for key, text in texts.items():
        default, value = select_value(defaults, key), select_value(cfg, key)
        if default is None or has_same_type(value, default):
            continue
        is_scalar = isinstance(default, bool | int | float | str) and default != ""
        example = f", such as {default}" if is_scalar else ""
        raise UserError(f"{text}: expected {TYPE_NAMES[get_value_type(default)]}{example}")


def _names_group(key: str) -> bool:
    """Return whether an override chooses an option of a group, or is one of Hydra's own."""
    return (CONF / key).is_dir() or key.startswith("hydra") or "@" in key


def _holds_spec(key: str) -> bool:
    """Return whether an override is a spec, which `fp4dit.numerics.specs` parses and checks."""
    group, _, name = key.partition(".")
    return group in SPEC_GROUPS and name.rpartition(".")[2] in SPEC_KEYS


def describe_type_error(node: Any, name: str = "") -> str | None:
    """Describe the first argument in a config that does not have its annotated type.

    Args:
        node: A resolved config, in which `_target_` names what receives the arguments.
        name: The dotted name of the node.

    Returns:
        A message, or None if there is no such argument.
    """
    if isinstance(node, list):
        children = [(f"{name}.{i}", item) for i, item in enumerate(node)]
        types = {}
    elif isinstance(node, Mapping):
        children = [(f"{name}.{key}" if name else key, value) for key, value in node.items()]
        types = get_parameter_types(node["_target_"]) if "_target_" in node else {}
    else:
        return None
    for path, value in children:
        hint = types.get(path.rpartition(".")[2], Any)
        if is_plain_value(value) and not is_bearable(value, hint, conf=INT_AS_FLOAT):
            names = [describe_type_hint(part) for part in get_args(hint) or [hint]]
            shown = "null" if value is None else value
            return f"{path}={shown}: expected {' or '.join(names)}"
        if message := describe_type_error(value, path):
            return message
    return None


def get_parameter_types(target: Any) -> dict[str, Any]:
    """Return the annotated types of a class's or function's parameters, if they can be known."""
    try:
        function = resolve_name(target)
        if isinstance(function, type):
            function = function.__init__
        return get_type_hints(function)
    except (ImportError, AttributeError, NameError, TypeError, ValueError):
        return {}


def is_plain_value(value: Any) -> bool:
    """Return whether Hydra passes the value on as it is, and instantiates no part of it."""
    if isinstance(value, Mapping):
        return "_target_" not in value and all(map(is_plain_value, value.values()))
    if isinstance(value, list):
        return all(map(is_plain_value, value))
    return True


def describe_type_hint(hint: Any) -> str:
    """Return a type's name in plain English."""
    if hint is NoneType:
        return "null"
    return TYPE_NAMES.get(hint) or getattr(hint, "__name__", str(hint))


def select_value(config: DictConfig, key: str) -> Any:
    """Return the value at a dotted name; None if there is none or it cannot be known yet."""
    try:
        return OmegaConf.select(config, key)
    except (OmegaConfBaseException, UserError):
        return None


def get_value_type(value: Any) -> type:
    """Return the type of a value in a config: dict or list for a config node."""
    if OmegaConf.is_config(value):
        return dict if OmegaConf.is_dict(value) else list
    return type(value)


def has_same_type(value: Any, default: Any) -> bool:
    """Return whether a value can replace a default.

    A whole number can replace any number, and null anything but a list.
    """
    expected = get_value_type(default)
    if value is None:
        return expected is not list
    if expected is float:
        return get_value_type(value) in (int, float)
    return expected not in TYPE_NAMES or get_value_type(value) is expected


def check_numbers_finite(stage: str, identity: Mapping[str, Any]) -> None:
    """Raise a UserError if a number of an identity is infinite or NaN, which JSON does not have."""
    for name, value in iter_leaves(identity):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}={value} of the stage {stage}: give a finite number")


def iter_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in nested mappings and lists, with its dotted name."""
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)
    for name, value in items:
        if isinstance(value, dict | list):
            yield from iter_leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


SECRET_NAMES = re.compile("TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)

ENVIRONMENT_REFERENCE = re.compile(r"oc\.env:\s*(\w+)")

MIN_SECRET_LENGTH = 12  # characters; a shorter value may stand in a config by chance


def check_secrets(cfg: DictConfig) -> None:
    """Check that a config neither contains nor reads an environment variable that is a secret.

    Raises:
        UserError: with the name of the variable.
    """
    check_text_for_secrets(OmegaConf.to_yaml(cfg))


def check_text_for_secrets(text: str) -> None:
    """Check a text as `check_secrets` does, such as a command line before Hydra stores it.

    Raises:
        UserError: with the name of the variable.
    """
    names = ENVIRONMENT_REFERENCE.findall(text)
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_LENGTH and value in text:
            names.append(name)
    for name in names:
        if SECRET_NAMES.search(name):
            raise UserError(
                f"{name} is in the configuration, which is stored and shown: leave it out. What "
                "needs it, such as wandb or the hub, reads it from the environment"
            )
