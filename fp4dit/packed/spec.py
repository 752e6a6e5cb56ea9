"""What describes quantization, as JSON that a person can read and that may come from anybody: nothing named in it is
imported, and only what is listed here is made.

A dataclass is {"kind": "AbsMax", "store": null}, with all of its fields, for a default may change one day; a function
is {"function": "even"}. Lists and tuples are arrays, and come back as tuples.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from reprlib import repr as brief
from types import FunctionType, ModuleType
from typing import Any, get_type_hints

from fp4dit import ams, blockscales, choice, formats, hadamard, observers, quantizer, scales, transforms
from fp4dit.errors import UserError
from fp4dit.packed import description, layout, numbers
from fp4dit.packed.annotations import fitted, shown
from fp4dit.policy import Rule

MODULES = (
    *(ams, blockscales, choice, formats, hadamard, observers, quantizer, scales, transforms),
    *(description, layout, numbers),
)
DEEPEST = 20  # levels of JSON
MOST = 100_000  # values in it; to name 500 layers in five ranges of timesteps takes 2,500
LARGEST = 2**53  # every reader of JSON keeps integers up to here


def own(module: ModuleType) -> list[type]:
    """The dataclasses that the module itself defines and that are their fields: frozen, and equal if those are."""
    return [
        found
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__ and is_dataclass(found)
        if found.__dataclass_params__.frozen and found.__dataclass_params__.eq  # pyright: ignore
    ]


KINDS = {kind.__name__: kind for kind in (Rule, *(kind for module in MODULES for kind in own(module)))}
# Those that a field may hold; no other function of the library is for a checkpoint to choose.
FUNCTIONS = {
    function.__name__: function
    for function in (
        *(blockscales.below, blockscales.ceil, blockscales.even, blockscales.floor, blockscales.nearest),
        blockscales.largest,
    )
}


def describe(value: Any) -> Any:
    """
    Raises:
        UserError: if it holds what `made` would not make.
    """
    if KINDS.get(type(value).__name__) is type(value):
        return {"kind": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, FunctionType) and FUNCTIONS.get(value.__name__) is value:
        return {"function": value.__name__}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) and key not in ("kind", "function") for key in value):
        return {key: describe(item) for key, item in value.items()}
    if plain(value):
        return value
    raise UserError(
        f"a checkpoint cannot say what {value!r} is: it holds finite numbers up to 2^53, text, and fp4dit's own "
        "number formats, scale rules, transforms and observers"
    )


def plain(value: Any) -> bool:
    """Whether it is its own JSON, and any reader's."""
    if isinstance(value, int):
        return abs(value) <= LARGEST
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str)


def made(json: Any, expected: Any = Any, path: str = "quantization_config") -> Any:
    """What `describe` described. `expected` is its type, and `path` is what the JSON is called in messages.

    Raises:
        UserError: if it is anything else; the message says where.
    """
    bounded(json, path)
    return field(json, expected, path)


def bounded(json: Any, path: str) -> None:
    level, count = [json], 1
    for _ in range(DEEPEST):
        level = [value for outer in level for value in inside(outer)]
        count += len(level)
        if count > MOST:
            raise UserError(f"{path} holds more than {MOST} values: no checkpoint of fp4dit does")
        if not level:
            return
    raise UserError(f"{path} is nested more than {DEEPEST} levels deep: no checkpoint of fp4dit is")


def inside(json: Any) -> Iterable[Any]:
    if isinstance(json, dict):
        return json.values()
    return json if isinstance(json, list) else ()


def field(json: Any, hint: Any, path: str) -> Any:
    """The value of a field with this annotation."""
    value = built(json, path)
    try:
        return fitted(value, hint)
    except TypeError as error:
        raise UserError(f"{path} must be {shown(hint)}, not {brief(json)}") from error


def built(json: Any, path: str) -> Any:
    if isinstance(json, dict) and "kind" in json:
        return instance(json, path)
    if isinstance(json, dict) and "function" in json:
        if others := sorted(json.keys() - {"function"}):
            raise UserError(f"{path}.{others[0]} has no place beside the name of a function")
        return listed(json["function"], FUNCTIONS, f"{path}.function")
    if isinstance(json, dict):
        return {key: built(value, f"{path}.{key}") for key, value in json.items()}
    if isinstance(json, list):
        return tuple(built(value, f"{path}[{i}]") for i, value in enumerate(json))
    if not plain(json):
        raise UserError(f"{path} is {brief(json)}: only finite numbers up to 2^53 can be read back")
    return json


def listed(name: Any, known: Mapping[str, Any], path: str) -> Any:
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{path} is {brief(name)}, which is none of fp4dit's: install the fp4dit that wrote it")
    return known[name]


def instance(json: Mapping[str, Any], path: str) -> Any:
    kind = listed(json["kind"], KINDS, f"{path}.kind")
    hints, names = get_type_hints(kind), [f.name for f in fields(kind)]
    if wrong := sorted(set(names) ^ (json.keys() - {"kind"})):
        raise UserError(f"{path}.{wrong[0]} is {'missing' if wrong[0] in names else f'no field of {kind.__name__}'}")
    values = {name: field(json[name], hints[name], f"{path}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
