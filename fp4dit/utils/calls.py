"""Forward calls of a model and its blocks, recorded with all their arguments."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class Call:
    """The arguments of one forward pass, whatever their number and names.

    Models and their blocks differ: PixArt passes a timestep, HunyuanDiT a rotary embedding and a
    long skip connection. A call holds all arguments, so that one algorithm serves all models.

    Example:
        >>> call = Call((hidden,), {"timestep": timestep})
        >>> output = call(block)  # block(hidden, timestep=timestep)
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)

    def bind_arguments(self, module: nn.Module) -> dict[str, Any]:
        """Return the arguments by the parameter names of `module.forward`."""
        return inspect.signature(module.forward).bind(*self.args, **self.kwargs).arguments


@contextmanager
def remove_hooks(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end of the `with` statement."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def record_calls(module: nn.Module) -> Iterator[list[Call]]:
    """Collect the calls of `module` inside the `with` statement."""
    calls: list[Call] = []

    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        calls.append(Call(args, kwargs))

    with remove_hooks([module.register_forward_pre_hook(hook, with_kwargs=True)]):
        yield calls
