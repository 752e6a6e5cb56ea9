"""Convert the description of a packed model to JSON, and back.

A dataclass is `{"kind": tag, ...}` with all of its fields, because a default may change one day. A
function is `{"function": tag}`. Lists and tuples are arrays, and are read back as tuples.

The tags are those of `fp4dit.registry`. A checkpoint may come from anybody, so it may contain only
those of `CHECKPOINT_KINDS`: nothing else is imported or constructed.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from inspect import signature
from reprlib import repr as shorten
from types import FunctionType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fp4dit.registry import CHECKPOINT_KINDS, import_kind
from fp4dit.utils.errors import UserError

# The tags of functions have a path that ends in a name in lower case.
FUNCTION_TAGS = tuple(
    tag for tag, path in CHECKPOINT_KINDS.items() if path.rpartition(".")[2].islower()
)

CLASS_TAGS = tuple(tag for tag in CHECKPOINT_KINDS if tag not in FUNCTION_TAGS)

MAX_JSON_DEPTH = 20

MAX_JSON_VALUES = 100_000  # 2,500 are needed for 500 layers in five ranges of timesteps

MAX_JSON_INTEGER = 2**53  # every reader of JSON keeps integers up to here


@cache
def tags_by_object() -> Mapping[Any, tuple[str, str]]:
    """Return the key ("kind" or "function") and the tag of each class and function."""
    tags: dict[Any, tuple[str, str]] = {}
    for tag in CLASS_TAGS:
        tags[import_kind(tag)] = ("kind", tag)
    for tag in FUNCTION_TAGS:
        tags[import_kind(tag)] = ("function", tag)
    return tags


def to_tagged_json(value: Any) -> Any:
    """Convert a value to JSON that `from_tagged_json` reads.

    Raises:
        UserError: if it contains anything that `from_tagged_json` would not construct.
    """
    key, tag = find_tag(type(value))
    if key == "kind":
        values = {field.name: to_tagged_json(getattr(value, field.name)) for field in fields(value)}
        return {"kind": tag, **values}
    if isinstance(value, FunctionType):
        key, tag = find_tag(value)
        if key == "function":
            return {"function": tag}
    if isinstance(value, list | tuple):
        return [to_tagged_json(item) for item in value]
    if isinstance(value, Mapping) and all(is_plain_key(key) for key in value):
        return {key: to_tagged_json(item) for key, item in value.items()}
    if is_json_scalar(value):
        return value
    raise UserError(
        f"a checkpoint cannot say what {value!r} is: it holds finite numbers up to 2^53, text, and "
        "fp4dit's own number formats, scale rules, transforms and observers"
    )


def find_tag(listed: Any) -> tuple[str | None, str]:
    """Return the key and tag of a class or function; the key is None if it has none."""
    return tags_by_object().get(listed, (None, ""))


def is_plain_key(key: Any) -> bool:
    """Return whether an object may have this key without looking like a tagged one."""
    return isinstance(key, str) and key not in ("kind", "function")


def is_json_scalar(value: Any) -> bool:
    """Return whether a value is a scalar that every reader of JSON keeps unchanged."""
    if isinstance(value, int):
        return abs(value) <= MAX_JSON_INTEGER
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str)


def from_tagged_json(json: Any, expected: Any = Any, path: str = "quantization_config") -> Any:
    """Construct the value that `to_tagged_json` converted to JSON.

    Args:
        expected: The annotation that the value must fit.
        path: The name of the JSON in messages.

    Raises:
        UserError: if the JSON is anything else. The message contains the path to the mistake.
    """
    check_json_size(json, path)
    return parse_field(json, expected, path)


def check_json_size(json: Any, path: str) -> None:
    """Raise UserError if JSON is nested too deeply or has too many values."""
    level, count = [json], 1
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for value in level:
            children.extend(list_json_children(value))
        level = children
        count += len(level)
        if count > MAX_JSON_VALUES:
            raise UserError(
                f"{path} holds more than {MAX_JSON_VALUES} values: no checkpoint of fp4dit does"
            )
        if not level:
            return
    raise UserError(
        f"{path} is nested more than {MAX_JSON_DEPTH} levels deep: no checkpoint of fp4dit is"
    )


def list_json_children(json: Any) -> Iterable[Any]:
    """Return the values directly inside an object or array."""
    if isinstance(json, dict):
        return json.values()
    return json if isinstance(json, list) else ()


def parse_field(json: Any, hint: Any, path: str) -> Any:
    """Parse the value of a field with an annotation.

    Raises:
        UserError: if the value does not fit the annotation.
    """
    value = parse_value(json, path)
    try:
        return convert_to_hint(value, hint)
    except TypeError as error:
        raise UserError(f"{path} must be {format_hint(hint)}, not {shorten(json)}") from error


def parse_value(json: Any, path: str) -> Any:
    """Parse a value of any kind.

    Raises:
        UserError: if `to_tagged_json` cannot make such a value.
    """
    if isinstance(json, dict) and "kind" in json:
        return parse_dataclass(json, path)
    if isinstance(json, dict) and "function" in json:
        if others := sorted(json.keys() - {"function"}):
            raise UserError(f"{path}.{others[0]} has no place beside the name of a function")
        return import_by_tag(json["function"], FUNCTION_TAGS, f"{path}.function")
    if isinstance(json, dict):
        return {key: parse_value(value, f"{path}.{key}") for key, value in json.items()}
    if isinstance(json, list):
        return tuple(parse_value(value, f"{path}[{i}]") for i, value in enumerate(json))
    if not is_json_scalar(json):
        raise UserError(
            f"{path} is {shorten(json)}: only finite numbers up to 2^53 can be read back"
        )
    return json


def import_by_tag(tag: Any, allowed: Sequence[str], path: str) -> Any:
    """Return the class or function of a tag.

    Raises:
        UserError: if the tag is not one of `allowed`.
    """
    if not isinstance(tag, str) or tag not in allowed:
        raise UserError(
            f"{path} is {shorten(tag)}, which fp4dit does not know: install the fp4dit that wrote "
            "it"
        )
    return import_kind(tag)


def parse_dataclass(json: Mapping[str, Any], path: str) -> Any:
    """Construct the dataclass of a tagged object.

    A field that is None by default may be missing, because it may be younger than the checkpoint.

    Raises:
        UserError: if another field is missing or unknown, or if the class refuses a value.
    """
    kind = import_by_tag(json["kind"], CLASS_TAGS, f"{path}.kind")
    absent = {f.name: None for f in fields(kind) if f.default is None}
    json = absent | dict(json)
    hints, names = get_type_hints(kind), [field.name for field in fields(kind)]
    if wrong := sorted(set(names) ^ (json.keys() - {"kind"})):
        problem = "missing" if wrong[0] in names else f"no field of {json['kind']}"
        raise UserError(f"{path}.{wrong[0]} is {problem}")
    values = {name: parse_field(json[name], hints[name], f"{path}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def convert_to_hint(value: Any, hint: Any) -> Any:
    """Return `value` if it fits an annotation, with integers converted where a float is expected.

    Raises:
        TypeError: if it does not fit.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return convert_to_first_hint(value, arguments)
    if origin in (Sequence, tuple) and arguments[1:] in ((), (...,)) and isinstance(value, tuple):
        return tuple(convert_to_hint(item, arguments[0]) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: convert_to_hint(item, arguments[1]) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or matches_hint(value, hint, origin, arguments):
        return value
    raise TypeError(f"not {format_hint(hint)}: {value!r}")


def convert_to_first_hint(value: Any, hints: Sequence[Any]) -> Any:
    """Convert `value` to the first of several annotations that it fits.

    Raises:
        TypeError: if it fits none.
    """
    for hint in hints:
        try:
            return convert_to_hint(value, hint)
        except TypeError:
            continue
    raise TypeError(f"none of {', '.join(map(format_hint, hints))}: {value!r}")


def matches_hint(value: Any, hint: Any, origin: Any, arguments: Sequence[Any]) -> bool:
    """Return whether `value` fits an annotation other than a union, sequence or mapping."""
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Callable:
        return callable(value) and parameter_annotations(value) == arguments[0]
    if hint in (bool, int, float, str):  # True is an instance of int, and is no number
        return type(value) is hint
    if not isinstance(hint, type) or not isinstance(value, hint):
        return False
    if "__call__" not in vars(hint):
        return True
    return parameter_annotations(value) == parameter_annotations(hint.__call__)[1:]


def parameter_annotations(function: Callable[..., Any]) -> list[Any]:
    """Return the annotations of a callable's parameters.

    Protocols whose only member is `__call__` differ in nothing else.
    """
    return [parameter.annotation for parameter in signature(function).parameters.values()]


def format_hint(hint: Any) -> str:
    """Return an annotation as it is written in the source, without module names."""
    if isinstance(hint, type):
        return hint.__name__
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))
