"""Parser of specs: the words of configs, and mappings of a word and its options.

`fp4dit/numerics/specs.py` says what a spec looks like, and has the words of this package.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

from beartype import BeartypeConf
from beartype.door import is_bearable

from fp4dit.registry import import_kind
from fp4dit.utils.errors import UserError

Spec = str | Mapping[str, Any]


def suggest_words(word: str, known: Iterable[str]) -> str:
    """Return what an error message says after an unknown word: the nearest ones, else all."""
    known = list(known)
    close = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known)}"


def check_options(options: Iterable[str], known: Iterable[str], subject: str) -> None:
    """Raise if an option is unknown.

    Raises:
        UserError: at the first unknown one. The message names the nearest known ones.
    """
    known = list(known)
    for option in options:
        if option not in known:
            if not known:
                raise UserError(f"{subject} has no options, and {option!r} was given")
            raise UserError(f"{subject} has no option {option!r}; {suggest_words(option, known)}")


def parse_spec(
    spec: Any,
    words: Mapping[str, str],
    key: str,
    subject: str,
    parsers: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Any:
    """Make the object that a spec stands for.

    Args:
        spec: A word, a mapping of `key` to a word and of options to values, or an object, which is
            returned unchanged.
        words: The known words, and the tags of their classes or functions.
        key: The option that holds the word.
        subject: What the spec describes, for error messages.
        parsers: Parsers of options that are specs themselves, by name of the option.

    Raises:
        UserError: if the word or an option is unknown, or a value has the wrong type.
    """
    if spec is None or isinstance(spec, bool | int | float | list | tuple):
        raise UserError(f"{subject} {spec} is not known; there are {', '.join(words)}")
    if not isinstance(spec, str | Mapping):
        return spec
    options: dict[str, Any] = {key: spec} if isinstance(spec, str) else dict(spec)
    if key not in options:
        raise UserError(
            f"{subject} {spec} has no {key!r}: give {key}: and one of {', '.join(words)}"
        )
    word = options.pop(key)
    if not isinstance(word, str) or word not in words:
        raise UserError(f"{subject} {word!r} is not known; {suggest_words(str(word), words)}")
    kind = import_kind(words[word])
    names = [f.name for f in fields(kind)] if isinstance(kind, type) else []
    check_options(options, names, f"{subject} {word!r}")
    if not isinstance(kind, type):
        return kind
    values = {}
    for name, value in options.items():
        parser = (parsers or {}).get(name)
        values[name] = parser(value) if parser else value
    return kind(**check_values(kind, values, f"{subject} {word!r}"))


def check_values(kind: type, values: Mapping[str, Any], subject: str) -> dict[str, Any]:
    """Return the values of a dataclass's fields, with whole numbers as floats if need be.

    Raises:
        UserError: if a required field is missing, or a value has the wrong type.
    """
    hints = get_type_hints(kind)
    for f in fields(kind):
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in values:
            raise UserError(f"{subject} needs the option {f.name!r}")
    checked = {}
    for name, value in values.items():
        if not is_bearable(value, hints[name], conf=BeartypeConf(is_pep484_tower=True)):
            raise UserError(f"{subject}: {name}={value} is not {describe_type(hints[name])}")
        checked[name] = float(value) if hints[name] is float else value
    return checked


def describe_type(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return names.get(hint) or f"of the type {getattr(hint, '__name__', hint)}"
