"""Find which tensors others were computed from, by watching the operations."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

# Methods that return what a tensor holds as plain values. What is done with these is not seen.
READS = {"tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "equal"}


class DependencyTracker(TorchFunctionMode):
    """Follows named tensors through all operations inside the `with` statement.

    Tensors that share memory have the same names.

    Example:
        >>> tracker = DependencyTracker()
        >>> x, y = torch.ones(3), torch.zeros(3)
        >>> tracker.name_tensor("x", x)
        >>> with tracker:
        ...     z = x.flip(0) * 2 + y
        >>> tracker.find_names([z])
        {'x'}
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[int, set[str]] = {}
        self.read: set[str] = set()  # the names of tensors whose values were read
        self.storages: list[torch.UntypedStorage] = []  # kept, so that no address is used again

    def name_tensor(self, name: str, tensor: Tensor) -> None:
        """Give a tensor a name."""
        self.add_names(tensor, {name})

    def find_names(self, tensors: Collection[Any]) -> set[str]:
        """Return the names of all tensors that the values were computed from."""
        names = set(self.read)
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                names |= self.names.get(tensor.untyped_storage()._cdata, set())
        return names

    def add_names(self, tensor: Tensor, names: set[str]) -> None:
        """Add names to a tensor."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.names:
            self.names[storage._cdata] = set()
            self.storages.append(storage)
        self.names[storage._cdata] |= names

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        output = func(*args, **options)
        name = getattr(func, "__name__", "")
        inputs = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        names: set[str] = set()
        for tensor in inputs:
            names |= self.names.get(tensor.untyped_storage()._cdata, set())
        if not names:
            return output
        if name in READS:
            self.read |= names
        changed = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if name.startswith("__i") or name in ("__setitem__", "__set__") or name.endswith("_"):
            changed.append(inputs[0])
        for tensor in [*changed, *tree_leaves(options.get("out"))]:
            if isinstance(tensor, Tensor):
                self.add_names(tensor, names)
        return output
