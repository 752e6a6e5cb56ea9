"""Kinds of calls of a transformer. Calls of one kind differ in nothing but the rows of tensors.

The calls of a pipeline may differ from prompt to prompt, and between the branches of guidance: in
the number of text tokens, or in plain values. Nothing is padded. The samples of a call are sorted
by the kind of call that each would be alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fp4dit.data.captured import CALL_KIND
from fp4dit.models.blocks import ActivationState, ReadOnlyState
from fp4dit.models.call_reader import CallReader, count_samples
from fp4dit.models.templates import (
    Each,
    Rows,
    fill_template,
    find_counts,
    from_tree,
    hash_template,
    iter_pairs,
    list_rows,
    make_template,
    map_template,
    to_tree,
)
from fp4dit.utils.calls import Call, find_timestep_name, read_timestep
from fp4dit.utils.errors import UserError


def name_arguments(transformer: nn.Module, call: Call) -> dict[str, Any]:
    """Return the arguments of a call by name, also those that `**kwargs` collects."""
    names = set(call.kwargs)
    named = {}
    for name, value in call.bind_arguments(transformer).items():
        is_collected = isinstance(value, dict) and name not in names and value.keys() <= names
        named |= value if is_collected else {name: value}
    return named


@dataclass(frozen=True)
class CallKind:
    """Calls of a transformer that differ in nothing but the rows of tensors.

    Args:
        arguments: The template of the arguments, by their names.
        content: Hashes of the integers of a sample, if the shapes inside the transformer depend on
            them.

    Example:
        >>> kind = CallKind.compare(transformer, calls_of_two_sizes, (2, 3))
        >>> [(rows, kind, state)] = kind.read_call(transformer, call, by_content=False)
        >>> same_call = kind.make_call(state)
    """

    arguments: dict[str, Any]
    content: tuple[str, ...] = ()

    @classmethod
    def compare(
        cls, transformer: nn.Module, calls: tuple[Call, Call], ratio: tuple[int, int]
    ) -> "CallKind":
        """Find which arguments belong to the samples, from calls with two numbers of samples.

        Args:
            transformer: The transformer.
            calls: The calls.
            ratio: Numbers that have the ratio of the numbers of samples, such as those of prompts.

        Raises:
            UserError: if nothing grows with the number of samples, or there is no timestep.
        """
        a, b = (name_arguments(transformer, call) for call in calls)
        read_timestep(transformer, calls[0])  # raises an error if there is none
        sizes = set(find_counts(a, b, ratio))
        if not sizes:
            raise UserError(
                f"{type(transformer).__name__} is called with {', '.join(a)}, and none of them "
                "grows with the number of prompts"
            )
        template = make_template(a, b, min(sizes), "")
        return cls(rename_rows(template, find_special_names(template)))

    @cached_property
    def number(self) -> int:
        """The number of the kind, which is the same in every process."""
        return hash_template([self.arguments, self.content])

    @property
    def rows(self) -> list[Rows]:
        """The placeholders of rows of the arguments."""
        return list_rows(self.arguments)

    def fill(self, count: int, fill: Callable[[Rows], Tensor], device: torch.device | str) -> Call:
        """Make a call with `count` samples on a device, with the rows that `fill` returns."""
        arguments = map_template(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self.arguments
        )
        return Call((), fill_template(arguments, count, fill))

    def make_call(self, state: ReadOnlyState) -> Call:
        """Make the call whose rows are those of the state."""
        timestep = state["timestep"]
        return self.fill(len(timestep), lambda rows: state[rows.name], timestep.device)

    def make_example_call(self, count: int, device: torch.device | str) -> Call:
        """Make a call with `count` equal samples on a device."""
        return self.fill(count, lambda rows: rows.repeat_example(count).to(device), device)

    def read_call(
        self, transformer: nn.Module, call: Call, by_content: bool
    ) -> list[tuple[Int[Tensor, "n"], "CallKind", ActivationState]]:
        """Sort the samples of a call by kind. The call may be of another kind itself.

        Args:
            transformer: The transformer.
            call: The call.
            by_content: Whether samples with different integers, such as those of masks, are of
                different kinds, because the shapes inside the transformer depend on them.

        Returns:
            For each kind, the numbers of the samples, the kind, and their rows by name.
        """
        arguments = name_arguments(transformer, call)
        reader = CallReader(count_samples(arguments, self.arguments))
        template = reader.read(arguments, self.arguments, "")
        timesteps = read_timestep(transformer, call).expand(reader.count)
        device = "cpu" if timesteps.is_meta else timesteps.device
        parts = []
        for content, index in reader.group_samples(by_content):
            rows = reader.select(index)
            kind_template = reader.describe_kind(template, int(index[0]), rows)
            names = find_special_names(kind_template)
            kind = CallKind(rename_rows(kind_template, names), content)
            state = {names.get(name, name): value for name, value in rows.items()}
            if "timestep" not in state:  # the model has a timestep for each token
                state["timestep"] = timesteps[index.to(timesteps.device)]
            state[CALL_KIND] = torch.full((len(index),), kind.number, device=device)
            parts.append((index, kind, state))
        return parts

    def to_tree(self) -> Any:
        """Return the kind as a tree that `fp4dit.utils.pytree_io` saves."""
        return {"arguments": to_tree(self.arguments), "content": self.content}

    @classmethod
    def from_tree(cls, tree: Any) -> "CallKind":
        """Return the kind that `to_tree` returned as a tree."""
        return cls(from_tree(tree["arguments"]), tree["content"])


def find_special_names(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the arguments that are called `latent` and `timestep` for every model.

    Args:
        arguments: The template of the arguments, whose rows are named by their place.
    """
    names = {}
    key = find_timestep_name(arguments)
    if key and isinstance(arguments[key], Rows) and arguments[key].example.ndim == 0:
        names[key] = "timestep"
    for rows in list_rows(arguments):
        if rows.name not in names:
            return names | {rows.name: "latent"}
    return names


def rename_rows(template: Any, names: Mapping[str, str]) -> Any:
    """Return a template whose rows have other names."""

    def rename(leaf: Any) -> Any:
        if isinstance(leaf, Each):
            return Each(map_template(rename, leaf.item), leaf.is_tuple)
        if isinstance(leaf, Rows):
            return replace(leaf, name=names.get(leaf.name, leaf.name))
        return leaf

    return map_template(rename, template)


def move_call(call: Call, device: str) -> Call:
    """Return a call whose tensors are on a device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return Call(tree_map(move, call.args), tree_map(move, call.kwargs))


def read_rows(template: Any, output: Any, count: int) -> tuple[Tensor, ...]:
    """Return the rows of the tensors of an output, in the order of its template."""
    rows: list[Tensor] = []
    for placeholder, value in iter_pairs(template, output):
        rows.append(placeholder.split(value, count))
    return tuple(rows)
