"""Resume a computation whose time is spent in the calls of one module, such as a sampler."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from fp4dit.utils import pytree_io
from fp4dit.utils.resumable import load_checkpoint
from fp4dit.utils.save_timer import LONGEST, SaveTimer


@contextmanager
def resume_calls(
    module: nn.Module, path: Path, device: torch.device | str, seconds: float = LONGEST
) -> Iterator[None]:
    """Context manager: answer the first calls of a module with outputs that a killed run has saved.

    The computation is repeated from its start, and must call the module with the same arguments
    each time. Its hooks run at every call. The file remains, for the caller to remove.

    Args:
        module: The module.
        path: The file of the outputs.
        device: The device of the outputs.
        seconds: The longest time between two saves. See `SaveTimer`.
    """
    saved, timer = load_checkpoint(path) or [], SaveTimer(seconds)
    answers = iter([decode_output(output, device) for output in saved])
    replaced, forward = module.__dict__.get("forward"), module.forward

    @wraps(forward)
    def answer_or_compute(*args: Any, **kwargs: Any) -> Any:
        for answer in answers:
            return answer
        output = forward(*args, **kwargs)
        saved.append(encode_output(output))
        if timer.is_due:
            timer.save(lambda: pytree_io.save_tree(saved, path), path)
        return output

    module.forward = answer_or_compute
    try:
        yield
    finally:
        del module.forward
        if replaced is not None:
            module.forward = replaced


def encode_output(output: Any) -> dict[str, Any]:
    """Return the tensors of an output on the CPU, with what is needed to build it again."""
    leaves, structure = _pytree.tree_flatten(output)
    strides = [list(leaf.stride()) if isinstance(leaf, Tensor) else None for leaf in leaves]
    values = [leaf.cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return {
        "values": values,
        "strides": strides,
        "structure": _pytree.treespec_dumps(structure),
    }


def decode_output(encoded: dict[str, Any], device: torch.device | str) -> Any:
    """Return the output that `encode_output` encoded, on a device, with the same strides."""
    leaves = []
    for value, strides in zip(encoded["values"], encoded["strides"], strict=True):
        if isinstance(value, Tensor):
            empty = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=device)
            value = empty.copy_(value)
        leaves.append(value)
    return _pytree.tree_unflatten(leaves, _pytree.treespec_loads(encoded["structure"]))
