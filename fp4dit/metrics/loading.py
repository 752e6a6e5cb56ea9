"""Load published checkpoints into the networks of the metrics."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.utils.errors import UserError


def load_tensors(path: Path) -> Any:
    """Load a safetensors file, or a torch file that contains nothing but tensors.

    Raises:
        UserError: if the file is neither.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file makes torch and safetensors raise almost anything
        first_line = (str(error).splitlines() or [error])[0]
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line}") from error


def load_into(model: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> nn.Module:
    """Load weights into a model, and return it in evaluation mode.

    The tensors of `state` are assigned, not copied, so a model on the meta device never allocates
    memory of its own.

    Args:
        model: Model to load into.
        state: Weights by name.
        path: Origin of the weights, for the error message.

    Raises:
        UserError: if the weights belong to another model. The message names weights that are
            missing, unknown, or of another shape.
    """
    expected = model.state_dict()
    if problems := _describe_mismatches(expected, state):
        raise UserError(f"{path} is not a checkpoint of {type(model).__name__}: it {problems}")
    cast = {name: state[name].to(value.dtype) for name, value in expected.items()}
    model.load_state_dict(cast, assign=True)
    return model.eval().requires_grad_(False)


def _describe_mismatches(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    common = expected.keys() & state.keys()
    mismatches = {
        "lacks": [name for name in expected if name not in common],
        "has unknown": [name for name in state if name not in common],
        "has another shape of": [
            name for name in state if name in common and state[name].shape != expected[name].shape
        ],
    }
    parts = []
    for problem, names in mismatches.items():
        if names:
            parts.append(f"{problem} {', '.join(names[:2])} ({len(names)} in all)")
    return "; ".join(parts)
