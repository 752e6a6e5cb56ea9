"""Whether a value belongs in a dataclass's field, by the field's annotation.

Stricter than beartype, which looks at one item of a sequence only, and takes any two things that can be called for
each other.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


def fitted(value: Any, hint: Any) -> Any:
    """The value as such a field holds it: itself, but for whole numbers where a float belongs, and tuples of those.

    Raises:
        TypeError: if it does not belong there.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return first_fitted(value, arguments)
    if origin in (Sequence, tuple) and arguments[1:] in ((), (...,)) and isinstance(value, tuple):
        return tuple(fitted(item, arguments[0]) for item in value)
    if origin is Mapping and isinstance(value, dict):
        return {key: fitted(item, arguments[1]) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if hint is Any or fits(value, hint, origin, arguments):
        return value
    raise TypeError(f"not {shown(hint)}: {value!r}")


def first_fitted(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return fitted(value, hint)
        except TypeError:
            continue
    raise TypeError(f"none of {', '.join(map(shown, hints))}: {value!r}")


def fits(value: Any, hint: Any, origin: Any, arguments: Sequence[Any]) -> bool:
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Callable:
        return callable(value) and taken(value) == arguments[0]
    if hint in (bool, int, float, str):  # true is an int by inheritance only
        return type(value) is hint
    if not isinstance(hint, type) or not isinstance(value, hint):
        return False
    return "__call__" not in vars(hint) or taken(value) == taken(hint.__call__)[1:]


def taken(function: Callable[..., Any]) -> list[Any]:
    """The annotations of its parameters: what tells protocols apart that have nothing but a `__call__`."""
    return [parameter.annotation for parameter in signature(function).parameters.values()]


def shown(hint: Any) -> str:
    """As it is written in the source, without the modules."""
    return hint.__name__ if isinstance(hint, type) else re.sub(r"\b(?:\w+\.)+(?=\w)", "", str(hint))
