"""Detect NaN and infinity in a model's outputs, and report the module and the timestep."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fp4dit.utils.calls import Call, read_timestep, remove_hooks
from fp4dit.utils.errors import UserError


def all_finite(output: Any) -> bool:
    """Return whether no tensor of a module's output holds NaN or infinity."""
    for value in tree_leaves(output):
        if isinstance(value, Tensor) and not value.isfinite().all():
            return False
    return True


def nonfinite_error(layer: str, timestep: float) -> UserError:
    """Return the error that says which layer's output is not finite, and what to change."""
    return UserError(
        f"the output of {layer} holds NaN or infinity at timestep {timestep:g}, because its "
        "values exceed the range of the model's dtype: try model.dtype=float32, or leave the "
        f"layer in 16 bits: +weight.ignore=['{layer}*']"
    )


@torch.no_grad()
def find_first_nonfinite_module(model: nn.Module, call: Call) -> str:
    """Repeat a call, and return the name of the first module whose output is not finite.

    All modules are watched, not the innermost alone, because a quantized layer computes with the
    weight of the layer that it wraps, and a block has parameters of its own. Inner modules return
    before outer ones.
    """
    names: list[str] = []

    def watch(name: str, output: Any) -> None:
        if not all_finite(output):
            names.append(name)

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(
                module.register_forward_hook(lambda _m, _a, out, name=name: watch(name, out))
            )
    with remove_hooks(hooks):
        call(model)
    return names[0] if names else "the model's last operation"


@contextmanager
def nan_guard(model: nn.Module) -> Iterator[None]:
    """Raise an error inside the `with` statement when an output of `model` is not finite.

    Raises:
        UserError: with the first such layer and the timestep.
    """
    searching = False

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal searching
        if searching or all_finite(output):
            return
        searching = True  # finding the layer calls the model again
        call = Call(args, kwargs)
        timestep = float(read_timestep(module, call)[0])
        raise nonfinite_error(find_first_nonfinite_module(module, call), timestep)

    with remove_hooks([model.register_forward_hook(hook, with_kwargs=True)]):
        yield
