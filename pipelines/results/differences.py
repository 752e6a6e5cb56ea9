"""Differences between two identities, as dotted fields."""

import json
from collections.abc import Iterator
from typing import Any

MAX_VALUE_LENGTH = 100  # characters of a printed mapping or list

# The dotted name of a field, its old value and its new value.
Difference = tuple[str, Any, Any]


class _Absent:
    """The value of a field that one of two identities does not have."""

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def iter_differences(old: Any, new: Any, name: str = "") -> Iterator[Difference]:
    """Yield the dotted name, the old value and the new value of each field that differs.

    >>> list(iter_differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}))
    [('a.b', 1, 2), ('c', absent, 3)]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            path = f"{name}.{key}" if name else key
            yield from iter_differences(old.get(key, ABSENT), new.get(key, ABSENT), path)
    elif isinstance(old, list) and isinstance(new, list):
        for i in range(max(len(old), len(new))):
            old_item = old[i] if i < len(old) else ABSENT
            new_item = new[i] if i < len(new) else ABSENT
            yield from iter_differences(old_item, new_item, f"{name}.{i}")
    elif type(old) is not type(new) or old != new:
        yield name, old, new


def format_value(value: Any) -> str:
    """Format a value as JSON, but text without quotes. Long mappings and lists are shortened."""
    if isinstance(value, str | _Absent):
        return str(value)
    text = json.dumps(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."
