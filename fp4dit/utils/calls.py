"""Forward calls of a model and its blocks, recorded with all their arguments."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fp4dit.utils.errors import UserError


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


# The names that transformers of diffusers have for the timestep.
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "sigma", "sigmas", "noise_level")


def find_timestep_name(arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the argument that is the timestep, if there is one."""
    for name in TIMESTEP_NAMES:
        if arguments.get(name) is not None:
            return name
    return None


def read_timestep(module: nn.Module, call: Call) -> Tensor:
    """Return the timestep of a call of a transformer, with one number for each sample.

    A model may have one for each token. The largest of them is returned.

    Raises:
        UserError: if no argument has a name that timesteps have.
    """
    arguments = call.bind_arguments(module)
    name = find_timestep_name(arguments)
    if name is None:
        raise UserError(
            f"{type(module).__name__} is not called with a timestep: none of its arguments "
            f"{', '.join(arguments)} is called {', '.join(TIMESTEP_NAMES[:-1])} or "
            f"{TIMESTEP_NAMES[-1]}"
        )
    timestep = torch.as_tensor(arguments[name])
    return timestep.flatten(1).amax(1) if timestep.ndim > 1 else timestep.reshape(-1)


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
