"""Published checkpoints into the models that metrics are made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.errors import UserError


def tensors(path: Path) -> Any:
    """What a file holds: safetensors, or a file of torch's of which nothing but tensors is let in.

    Raises:
        UserError: if it is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes torch and safetensors raise almost anything
        raise UserError(f"{path} cannot be read as a checkpoint: {(str(error).splitlines() or [error])[0]}") from error


def fill(model: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> nn.Module:
    """The model with these weights, ready to be asked. It holds the tensors given, so that one made on the meta device
    never needs memory for others.

    Raises:
        UserError: if they are another model's: the message names what is missing, unknown, or of another shape.
    """
    own = model.state_dict()
    wrong = {
        "lacks": [name for name in own if name not in state],
        "has unknown": [name for name in state if name not in own],
        "has another shape of": [n for n, value in state.items() if n in own and value.shape != own[n].shape],
    }
    found = [f"{what} {', '.join(names[:2])} ({len(names)} in all)" for what, names in wrong.items() if names]
    if found:
        raise UserError(f"{path} is no checkpoint of {type(model).__name__}: it {'; '.join(found)}")
    model.load_state_dict({name: state[name].to(value.dtype) for name, value in own.items()}, assign=True)
    return model.eval().requires_grad_(False)
