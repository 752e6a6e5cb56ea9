"""Search of identities for import paths of this project, which would change when code moves."""

from collections.abc import Iterator
from typing import Any

OURS = ("fp4dit.", "pipelines.", "pkg://fp4dit")


def find_own_paths(identity: Any) -> list[str]:
    """Return the texts of an identity that name a place in this project."""
    return [text for text in iter_texts(identity) if text.startswith(OURS)]


def iter_texts(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from iter_texts(value)
    elif isinstance(node, str):
        yield node
