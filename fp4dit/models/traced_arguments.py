"""Nested arguments and outputs of a traced call, with shapes in place of tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    MappingKey,
    SequenceKey,
    TreeSpec,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

from fp4dit.models.blocks import ActivationState
from fp4dit.models.testing import ADAPTER_HINT
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError


@dataclass(frozen=True)
class RowShape:
    """Placeholder of a tensor that has one row per sample.

    Args:
        name: The name of the activation.
        row: The shape of one row.
        dtype: The dtype of the tensor.

    Example:
        >>> shape = RowShape("latent", torch.Size([4, 8, 8]), torch.float16)
        >>> shape.make_zeros(2, torch.device("cpu")).shape
        torch.Size([2, 4, 8, 8])
    """

    name: str
    row: torch.Size
    dtype: torch.dtype

    def make_zeros(self, count: int, device: torch.device) -> Tensor:
        """Return `count` rows of zeros, which share the memory of one number."""
        return torch.zeros((), dtype=self.dtype, device=device).expand(count, *self.row)


@dataclass(frozen=True)
class NestedTensors:
    """Nested arguments or outputs.

    Args:
        leaves: The flattened values. A `RowShape` stands for each tensor with one row per sample;
            other values are unchanged.
        spec: The structure of the nesting.

    Example:
        >>> shape = RowShape("timestep", torch.Size(), torch.float32)
        >>> nested = NestedTensors(*tree_flatten({"timestep": shape, "return_dict": False}))
        >>> nested.fill_leaves(lambda shape: torch.tensor([999.0, 500.0]))
        {'timestep': tensor([999., 500.]), 'return_dict': False}
    """

    leaves: tuple[Any, ...]
    spec: TreeSpec

    @property
    def row_shapes(self) -> list[RowShape]:
        return [leaf for leaf in self.leaves if isinstance(leaf, RowShape)]

    def fill_leaves(self, fill: Callable[[RowShape], Tensor]) -> Any:
        """Return the nested values with a tensor of `fill` in place of each `RowShape`."""
        values = [fill(leaf) if isinstance(leaf, RowShape) else leaf for leaf in self.leaves]
        return tree_unflatten(values, self.spec)


@dataclass(frozen=True)
class TracedArguments:
    """Arguments of a transformer in a recorded call.

    Args:
        tree: The arguments by their names. A tensor with a single number has a row for each
            sample: the same number.
        names: The name of each leaf, such as `added_cond_kwargs.resolution`.

    Example:
        >>> arguments = TracedArguments.from_call(transformer, call)
        >>> state = arguments.read_state(transformer, call)
        >>> same_call = arguments.make_call(lambda shape: state[shape.name])
    """

    tree: NestedTensors
    names: tuple[str, ...]

    @classmethod
    def from_call(cls, transformer: nn.Module, call: Call) -> "TracedArguments":
        """Describe the arguments of a call.

        Raises:
            UserError: if none of them is called `timestep`.
        """
        arguments = call.bind_arguments(transformer)
        if "timestep" not in arguments:
            raise UserError(
                f"{type(transformer).__name__} is not called with an argument `timestep`. "
                f"{ADAPTER_HINT}"
            )
        count = len(next(iter(arguments.values())))
        items, spec = tree_flatten_with_path(arguments)
        names = [format_key_path(path) for path, _ in items]
        names[0] = "latent"  # the same name as in other adapters
        leaves = []
        for name, (_, leaf) in zip(names, items, strict=True):
            leaves.append(describe_leaf(name, leaf, count))
        return cls(NestedTensors(tuple(leaves), spec), tuple(names))

    def read_state(self, transformer: nn.Module, call: Call) -> ActivationState:
        """Return the tensors of another call, each with one row per sample.

        Raises:
            UserError: if the call has other arguments, or another value of an argument that has no
                row per sample.
        """
        arguments = call.bind_arguments(transformer)
        values, spec = tree_flatten(arguments)
        count = len(next(iter(arguments.values())))
        class_name = type(transformer).__name__
        if spec != self.tree.spec:
            raise UserError(
                f"{class_name} is not called with the same arguments at each step. {ADAPTER_HINT}"
            )
        state = {}
        for name, leaf, value in zip(self.names, self.tree.leaves, values, strict=True):
            if isinstance(leaf, RowShape):
                state[name] = value if leaf.row else value.reshape(-1).expand(count)
            elif not values_equal(leaf, value):
                raise UserError(
                    f"{class_name}: {name} differs from call to call, and has no row for each "
                    f"sample. {ADAPTER_HINT}"
                )
        return state

    def make_call(self, fill: Callable[[RowShape], Tensor]) -> Call:
        """Make a call of the transformer with tensors of `fill`."""
        return Call((), self.tree.fill_leaves(fill))


def format_key_path(path: tuple[Any, ...]) -> str:
    """Return the keys and indices of a leaf in a nested structure, joined by dots."""
    parts = []
    for entry in path:
        if isinstance(entry, MappingKey):
            parts.append(str(entry.key))
        elif isinstance(entry, SequenceKey):
            parts.append(str(entry.idx))
        else:
            parts.append(str(entry))
    return ".".join(parts)


def describe_leaf(name: str, leaf: Any, count: int) -> Any:
    """Return a `RowShape` for a tensor with one row for each of `count` samples.

    A tensor with a single number gets one, too; anything else is returned unchanged.
    """
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.numel() == 1:
        return RowShape(name, torch.Size(), leaf.dtype)
    return RowShape(name, leaf.shape[1:], leaf.dtype) if len(leaf) == count else leaf


def values_equal(a: Any, b: Any) -> bool:
    """Return whether two arguments are equal.

    A tensor on the meta device equals every tensor of its shape.
    """
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return a.shape == b.shape and (a.is_meta or b.is_meta or torch.equal(a, b.to(a.device)))
