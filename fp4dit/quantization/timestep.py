"""The current timestep, for the layers and quantizers that depend on it."""

import torch
from torch import Tensor, nn

from fp4dit.utils.calls import Call, read_timestep


class TimestepContext:
    """Holder of the timestep of each row of the current batch, shared by the modules of a model.

    Attributes:
        timestep: Timesteps, of shape (rows,), or (1,) if all rows are at the same one.

    Example:
        >>> context = TimestepContext()
        >>> context.attach(model)  # from now on each call of the model sets the timestep
        >>> model(latents, timestep=torch.tensor([500]))
        >>> context.timestep
        tensor([500.])
    """

    def __init__(self) -> None:
        self.timestep = torch.zeros(1)

    def attach(self, model: nn.Module) -> None:
        """Read the timestep of every call of `model`."""
        model.register_forward_pre_hook(self.on_forward, with_kwargs=True)

    # This hook is a method and no closure, because it is pickled for spawned processes.
    def on_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Set the timestep to that of this call of `model`."""
        self.update(read_timestep(model, Call(args, kwargs)))

    def update(self, timestep: Tensor) -> None:
        """Set the timestep."""
        self.timestep = timestep.detach().flatten().float()


def set_timestep(model: nn.Module, timestep: Tensor) -> None:
    """Set the timestep in the contexts of all modules inside `model`.

    This replaces the hook of `TimestepContext.attach` where parts of the model are called alone.
    """
    for module in model.modules():
        context = getattr(module, "context", None)
        if isinstance(context, TimestepContext):
            context.update(timestep)
