"""Run a transformer on the meta device whose shapes depend on its masks."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MOST_VALUES = 2**16  # of a tensor whose content is known; masks of pairs of tokens are larger


class KnownContent(TorchFunctionMode):
    """Answers, inside the `with` statement, what some tensors on the meta device hold.

    What is computed from such tensors alone is computed on the CPU as well, and is known, too.

    Args:
        contents: Pairs of a tensor on the meta device and the same tensor with content.

    Example:
        >>> mask = torch.ones(2, 5, dtype=torch.bool)
        >>> twin = mask.to("meta")
        >>> with KnownContent((twin, mask)):
        ...     print(twin.sum(1).tolist(), torch.empty(2, 5, 8, device="meta")[twin].shape)
        [5, 5] torch.Size([10, 8])
    """

    def __init__(self, *contents: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        # With the twins, so that no identity is used again.
        self.contents = {id(twin): (twin, content) for twin, content in contents}

    def find_content(self, value: Any) -> Any:
        """Return the content of a tensor if it is known; anything else unchanged."""
        return self.contents[id(value)][1] if id(value) in self.contents else value

    def add_twin(self, value: Any) -> Any:
        """Return a tensor on the meta device whose content is this one; else the value itself."""
        if not isinstance(value, Tensor):
            return value
        twin = value.to("meta")
        self.contents[id(twin)] = (twin, value)
        return twin

    def compute(self, func: Any, args: tuple, options: dict[str, Any]) -> Any:
        """Compute a function of tensors whose contents are known."""
        try:
            output = func(*args, **options)
            sizes = [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if max(sizes, default=0) > MOST_VALUES:
                return output
        except (NotImplementedError, RuntimeError):
            pass  # the output depends on the contents
        output = func(*tree_map(self.find_content, args), **tree_map(self.find_content, options))
        return tree_map(self.add_twin, output)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, options)) if isinstance(leaf, Tensor)]
        known = [id(tensor) in self.contents for tensor in tensors]
        if not any(known) or getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **options)  # of attributes, the device must stay the meta device
        if all(known) and "device" not in options:
            return self.compute(func, args, options)
        if func is Tensor.__getitem__:  # how many rows a mask selects
            args = (args[0], tree_map(self.find_content, args[1]))
        return func(*args, **options)


def fill_masks(module: nn.Module) -> None:
    """Let a transformer on the meta device read its masks: in each call, nothing is masked.

    All integers and truth values that it gets on the meta device count as ones.
    """
    forward: Callable[..., Any] = module.forward
    if hasattr(forward, "__wrapped__") and "forward" in vars(module):
        return  # it can already

    @wraps(forward)
    def forward_with_masks(*args: Any, **kwargs: Any) -> Any:
        masks = []
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.is_meta and not leaf.dtype.is_floating_point:
                masks.append((leaf, torch.ones(leaf.shape, dtype=leaf.dtype)))
        with KnownContent(*masks):
            return forward(*args, **kwargs)

    module.forward = forward_with_masks
