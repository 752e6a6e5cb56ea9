"""Numbers that are none: caught where they arise, and named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fp4dit.calls import Call, removed
from fp4dit.errors import UserError


def finite(output: Any) -> bool:
    return all(bool(value.isfinite().all()) for value in tree_leaves(output) if isinstance(value, Tensor))


def not_finite(layer: str, timestep: float) -> UserError:
    return UserError(
        f"{layer} answers with NaN or infinity at timestep {timestep:g}. Its numbers outgrow the model's dtype: try "
        "model.dtype=float32, or leave the layer as it is with a weight rule of its own (quantizer: null)."
    )


@torch.no_grad()
def first_bad(model: nn.Module, call: Call) -> str:
    """The name of the first module whose answer holds NaN or infinity when `call` is made again.

    All modules are asked, not the innermost alone: a quantized layer computes with its source's weight, and a
    block with parameters of its own. The inner ones answer first.
    """
    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _m, _a, out, name=name: None if finite(out) else found.append(name))
        for name, module in model.named_modules()
        if name
    ]
    with removed(hooks):
        call(model)
    return found[0] if found else "the model's last operation"


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Inside the block, a call of `model` that answers with no number is an error that names layer and timestep."""
    busy = False

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal busy
        if busy or finite(output):
            return
        busy = True  # finding the layer calls the model again
        call = Call(args, kwargs)
        raise not_finite(first_bad(module, call), float(call.named(module)["timestep"].flatten()[0]))

    with removed([model.register_forward_hook(hook, with_kwargs=True)]):
        yield
