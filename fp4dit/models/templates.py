"""Templates of nested arguments and outputs, with placeholders for what each sample has of its own.

A template holds for any number of samples. `make_template` compares two calls with different
numbers of samples: what grows with this number belongs to the samples.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp4dit.utils import pytree_io
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class Rows:
    """Placeholder of a tensor that has one row for each sample.

    Args:
        name: The name of the activation.
        example: One row.
        dim: The dimension of the samples.
        is_merged: Whether each sample has several entries of that dimension, one after another, as
            the tokens of all samples in one sequence.
        is_number: Whether there is one number for all samples.

    Example:
        >>> rows = Rows("x_embedder.0", torch.zeros(5, 8), is_merged=True)
        >>> rows.merge(torch.zeros(2, 5, 8)).shape, rows.split(torch.zeros(10, 8), 2).shape
        (torch.Size([10, 8]), torch.Size([2, 5, 8]))
    """

    name: str
    example: Tensor
    dim: int = 0
    is_merged: bool = False
    is_number: bool = False

    def split(self, value: Tensor, count: int) -> Tensor:
        """Return the rows of a tensor, with the samples first."""
        if self.is_number:
            return value.reshape(-1).expand(count)
        if self.is_merged:
            value = value.unflatten(self.dim, (count, -1))
        return value.movedim(self.dim, 0)

    def merge(self, rows: Tensor) -> Tensor:
        """Return the tensor that has these rows."""
        if self.is_number:
            return rows
        value = rows.movedim(0, self.dim)
        return value.flatten(self.dim, self.dim + 1) if self.is_merged else value

    def repeat_example(self, count: int) -> Tensor:
        """Return `count` rows that are equal to the example."""
        return self.example.expand(count, *self.example.shape).clone()


@dataclass(frozen=True)
class Each:
    """Placeholder of a list that has one item for each sample.

    Args:
        item: The template of an item.
        is_tuple: Whether it is a tuple.

    Example:
        >>> Each([(1, 64, 64)])  # the sizes of the image of each sample
    """

    item: Any
    is_tuple: bool = False


def iter_items(value: Any) -> Iterator[tuple[str, Any]] | None:
    """Return the keys and items of a nested value; None for a value without items."""
    if isinstance(value, Mapping):
        return iter([(str(key), item) for key, item in value.items()])
    if isinstance(value, list | tuple):
        return iter([(str(i), item) for i, item in enumerate(value)])
    return None


def rebuild(value: Any, items: Sequence[Any]) -> Any:
    """Return a nested value of the same structure with other items."""
    if isinstance(value, Mapping):
        pairs = dict(zip(value, items, strict=True))
        return type(value)(**pairs) if dataclasses.is_dataclass(value) else pairs
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*items)
    return type(value)(items)


def map_template(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to the placeholders, tensors and plain values of a nested value."""
    items = iter_items(value)
    if items is None:
        return function(value)
    return rebuild(value, [map_template(function, item) for _, item in items])


def list_rows(template: Any) -> list[Rows]:
    """Return the placeholders of rows of a template, in order."""
    found: list[Rows] = []

    def collect(leaf: Any) -> Any:
        if isinstance(leaf, Each):
            found.extend(list_rows(leaf.item))
        elif isinstance(leaf, Rows):
            found.append(leaf)
        return leaf

    map_template(collect, template)
    return found


def fill_template(template: Any, count: int, fill: Callable[[Rows], Tensor]) -> Any:
    """Return nested values for `count` samples, with the rows that `fill` returns."""

    def fill_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Rows):
            return leaf.merge(fill(leaf))
        if isinstance(leaf, Each):
            values = {rows.name: fill(rows) for rows in list_rows(leaf.item)}
            items = [fill_item(leaf.item, values, i) for i in range(count)]
            return tuple(items) if leaf.is_tuple else items
        return leaf

    return map_template(fill_leaf, template)


def fill_item(template: Any, values: Mapping[str, Tensor], number: int) -> Any:
    """Return the item of one sample."""
    return map_template(
        lambda leaf: values[leaf.name][number] if isinstance(leaf, Rows) else leaf, template
    )


def find_counts(a: Any, b: Any, ratio: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield each pair of sizes, in two calls, that grows with the number of samples.

    Args:
        a, b: The arguments or outputs of two calls.
        ratio: The numbers of samples of both calls, or numbers that have their ratio.
    """

    def grows(size: int, other: int) -> bool:
        return size != other and size * ratio[1] == other * ratio[0]

    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.ndim == b.ndim:
            yield from (pair for pair in zip(a.shape, b.shape, strict=True) if grows(*pair))
        return
    items, others = iter_items(a), iter_items(b)
    if items is None or others is None or not isinstance(b, type(a)):
        return
    if isinstance(a, list | tuple) and grows(len(a), len(b)):
        yield len(a), len(b)
        return
    for (_, item), (_, other) in zip(items, others, strict=False):
        yield from find_counts(item, other, ratio)


def iter_pairs(template: Any, value: Any) -> Iterator[tuple[Rows, Tensor]]:
    """Yield each placeholder of rows with the tensor in its place; of lists of items, one tensor.

    The tensors of a list that has one item for each sample are stacked.
    """
    if isinstance(template, Rows):
        yield template, value
    elif isinstance(template, Each):
        pairs = [list(iter_pairs(template.item, item)) for item in value]
        for same in zip(*pairs, strict=True):
            yield same[0][0], torch.stack([tensor for _, tensor in same])
    else:
        for (_, item), (_, other) in zip(
            iter_items(template) or (), iter_items(value) or (), strict=True
        ):
            yield from iter_pairs(item, other)


def make_template(a: Any, b: Any, counts: tuple[int, int], name: str) -> Any:
    """Describe what two calls have in common, which differ in their number of samples.

    Args:
        a, b: The arguments or outputs of both calls.
        counts: The number of samples of both calls.
        name: The name of the value, with which the names of its parts begin.

    Returns:
        The template, whose examples are of call `a`.
    """
    if isinstance(a, Tensor):
        return describe_tensor(a, b, counts, name)
    if isinstance(a, list | tuple) and isinstance(b, type(a)) and (len(a), len(b)) == counts:
        return Each(describe_item(a[0], name), isinstance(a, tuple))
    items = iter_items(a)
    if items is None:
        return a
    others = dict(iter_items(b) or ())
    described = []
    for key, item in items:
        full_name = f"{name}.{key}" if name else key
        described.append(make_template(item, others.get(key, item), counts, full_name))
    return rebuild(a, described)


def describe_tensor(a: Tensor, b: Any, counts: tuple[int, int], name: str) -> Rows | Tensor:
    """Return a placeholder for a tensor that has rows; a tensor without is returned unchanged."""
    if isinstance(b, Tensor) and a.ndim == b.ndim:
        for dim, sizes in enumerate(zip(a.shape, b.shape, strict=True)):
            if sizes == counts:
                return Rows(name, a.select(dim, 0), dim)
        for dim, (size, other) in enumerate(zip(a.shape, b.shape, strict=True)):
            if size % counts[0] == 0 and size * counts[1] == other * counts[0] != size * counts[0]:
                rows = Rows(name, a, dim, is_merged=True)
                return dataclasses.replace(rows, example=rows.split(a, counts[0])[0])
    if a.numel() == 1 and counts[0] > 1:
        return Rows(name, a.reshape(()), is_number=True)
    return a


def describe_item(item: Any, name: str) -> Any:
    """Return the template of one sample's item: all of its tensors are its own."""
    items = iter_items(item)
    if items is None:
        return Rows(name, item) if isinstance(item, Tensor) else item
    return rebuild(item, [describe_item(each, f"{name}.{key}") for key, each in items])


def hash_template(template: Any) -> int:
    """Return a number that depends on the structure and the constants of a template.

    Of rows only their shape and their dtype count.

    Raises:
        UserError: if a constant is neither a tensor nor a plain value.
    """

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, Each):
            return {"each": map_template(describe, leaf.item)}
        if isinstance(leaf, Rows):
            about = (leaf.name, leaf.dim, leaf.is_merged, leaf.is_number)
            return [*about, list(leaf.example.shape), str(leaf.example.dtype)]
        return hash_content(leaf) if isinstance(leaf, Tensor) else leaf

    try:
        text = json.dumps(pytree_io.encode_value(map_template(describe, template), "", {}))
    except TypeError as error:
        message = f"an argument of the transformer cannot be written to a file: {error}"
        raise UserError(message) from error
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # fits into 64 bits with a sign


def hash_content(tensor: Tensor) -> str:
    """Return the hash of a tensor's values, shape and dtype."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if not tensor.is_meta:
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def to_tree(template: Any) -> Any:
    """Return a template as a tree that `fp4dit.utils.pytree_io` saves."""
    if isinstance(template, Rows):
        about = {key: value for key, value in vars(template).items() if key != "example"}
        return {"rows": about, "example": template.example.clone()}
    if isinstance(template, Each):
        return {"each": to_tree(template.item), "is_tuple": template.is_tuple}
    items = iter_items(template)
    if items is None:
        return {"value": template}
    if isinstance(template, Mapping):
        return {"dict": {key: to_tree(item) for key, item in template.items()}}
    return {"tuple" if isinstance(template, tuple) else "list": [to_tree(x) for _, x in items]}


def from_tree(tree: Mapping[str, Any]) -> Any:
    """Return the template that `to_tree` returned as a tree."""
    if "rows" in tree:
        return Rows(**tree["rows"], example=tree["example"])
    if "each" in tree:
        return Each(from_tree(tree["each"]), tree["is_tuple"])
    if "dict" in tree:
        return {key: from_tree(item) for key, item in tree["dict"].items()}
    if "list" in tree:
        return [from_tree(item) for item in tree["list"]]
    if "tuple" in tree:
        return tuple(from_tree(item) for item in tree["tuple"])
    return tree["value"]
