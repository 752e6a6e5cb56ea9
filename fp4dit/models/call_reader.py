"""Read the samples of a call of a transformer, given the template of another call."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fp4dit.models.blocks import ActivationState, ReadOnlyState
from fp4dit.models.templates import (
    Each,
    Rows,
    describe_item,
    hash_content,
    hash_template,
    iter_items,
    list_rows,
    map_template,
    rebuild,
)


class CallReader:
    """Reader of the rows of a call.

    Args:
        count: The number of samples of the call.

    Attributes:
        tensors: The rows of tensors, by the names of the placeholders.
        items: The items of each list that has one for each sample, by the name of the list.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.tensors: ActivationState = {}
        self.items: dict[str, list[Any]] = {}

    def read(self, value: Any, known: Any, name: str) -> Any:
        """Read the rows of a value, and return its template.

        Args:
            value: Arguments of the call, or a part of them.
            known: The template of the same arguments in another call; what is new there is
                recognized by its size.
            name: The name of the value.
        """
        if isinstance(value, Tensor):
            placeholder = self.describe_tensor(value, known, name)
            if isinstance(placeholder, Rows):
                self.tensors[name] = placeholder.split(value, self.count)
            return placeholder
        if isinstance(known, Each) and isinstance(value, list | tuple):
            self.items[name] = list(value)
            return Each(describe_item(value[0], name), isinstance(value, tuple))
        items = iter_items(value)
        if items is None:
            return value
        others = dict(iter_items(known) or ())
        read = []
        for key, item in items:
            read.append(self.read(item, others.get(key), f"{name}.{key}" if name else key))
        return rebuild(value, read)

    def describe_tensor(self, value: Tensor, known: Any, name: str) -> Rows | Tensor:
        """Return the placeholder of a tensor; the tensor itself if it has no rows."""
        if isinstance(known, Tensor):
            return value
        was_number = isinstance(known, Rows) and known.is_number
        is_number = value.numel() == 1 and (self.count > 1 or value.ndim == 0 or was_number)
        if not isinstance(known, Rows) or known.is_number != is_number:
            known = Rows(name, value, is_number=is_number)
            if not is_number and len(value) != self.count:
                return value
        placeholder = Rows(name, value, known.dim, known.is_merged, known.is_number)
        example = placeholder.split(value, self.count)[0]
        return Rows(name, example, known.dim, known.is_merged, known.is_number)

    def group_samples(self, by_content: bool) -> Iterator[tuple[tuple[str, ...], Int[Tensor, "n"]]]:
        """Yield the numbers of the samples that have equal items in all lists, group by group.

        Args:
            by_content: Whether their integers must be equal, too.

        Yields:
            The hashes of the integers, and the numbers.
        """
        groups: dict[tuple, list[int]] = {}
        for i in range(self.count):
            content = []
            if by_content:
                content = [hash_content(x[i]) for x in self.tensors.values() if is_content(x)]
            items = tuple(hash_template(item) for item in self.list_items(i))
            groups.setdefault((tuple(content), items), []).append(i)
        for (content, _), numbers in groups.items():
            yield content, torch.tensor(numbers)

    def list_items(self, number: int) -> list[Any]:
        """Return the template of the item of a sample in each list."""
        return [describe_item(items[number], name) for name, items in self.items.items()]

    def select(self, index: Int[Tensor, "n"]) -> ActivationState:
        """Return the rows of some samples, whose items have equal shapes."""
        rows: ActivationState = {}
        for name, value in self.tensors.items():
            rows[name] = value if len(index) == self.count else value[index.to(value.device)]
        for name, items in self.items.items():
            leaves = [list_rows(describe_item(items[i], name)) for i in index.tolist()]
            for same in zip(*leaves, strict=True):
                rows[same[0].name] = torch.stack([leaf.example for leaf in same])
        return rows

    def describe_kind(self, template: Any, number: int, rows: ReadOnlyState) -> Any:
        """Return the template of the calls that are like that of one sample.

        Args:
            template: The template of the whole call.
            number: The number of the sample.
            rows: Rows of samples that are like it.
        """
        items = iter(self.list_items(number))

        def describe(leaf: Any) -> Any:
            if isinstance(leaf, Each):
                return Each(next(items), leaf.is_tuple)
            return replace(leaf, example=rows[leaf.name][0]) if isinstance(leaf, Rows) else leaf

        return map_template(describe, template)


def is_content(rows: Tensor) -> bool:
    """Return whether rows are integers or truth values, of which a sample has several."""
    return not rows.dtype.is_floating_point and rows.ndim > 1


def count_samples(arguments: Mapping[str, Any], known: Mapping[str, Any]) -> int:
    """Return the number of samples of a call, given the template of another call."""

    def iter_counts(value: Any, template: Any) -> Iterator[int]:
        if isinstance(template, Rows) and isinstance(value, Tensor):
            if not template.is_number and not template.is_merged:
                yield value.shape[template.dim]
        elif isinstance(template, Each) and isinstance(value, list | tuple):
            yield len(value)
        else:
            items, others = iter_items(value), dict(iter_items(template) or ())
            for key, item in items or ():
                yield from iter_counts(item, others.get(key))

    return next(iter_counts(arguments, known))
