"""Save nested dicts, lists and tuples of tensors and plain values, without pickle.

All of it goes into one safetensors file. Each tensor is named by the path that leads to it, and
everything else is JSON in the metadata of the file.
"""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp4dit.utils.files import atomic_write
from fp4dit.utils.safetensors_io import save_tensors

Tensors = dict[str, Tensor]


def save_tree(value: Any, path: Path) -> None:
    """Write nested tensors and plain values to a file.

    Raises:
        OSError: if the file cannot be written.
        TypeError: if a value is neither a tensor nor JSON.
    """
    tensors: Tensors = {}
    text = json.dumps(encode_value(value, "", tensors), allow_nan=False)
    tensors = unshare_memory(tensors)
    with atomic_write(path) as part:
        save_tensors(tensors, part, {"tree": text, "crc32": str(compute_crc32(text, tensors))})


def load_tree(path: Path) -> Any:
    """Return what `save_tree` wrote to a file.

    Raises:
        OSError: if there is no such file.
        ValueError: if its content is not what was saved.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if int(about["crc32"]) != compute_crc32(about["tree"], tensors):
            raise ValueError("its content is not what was saved")
        return decode_value(json.loads(about["tree"]), tensors)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def encode_value(value: Any, path: str, tensors: Tensors) -> Any:
    """Encode a value as JSON, in which an object with one key says the type of its value.

    Args:
        value: The value.
        path: The path that leads to it.
        tensors: Receives the tensors in the value, by path.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # A list of pairs, because optimizer states have integer keys, which JSON cannot hold.
        pairs = []
        for key, item in value.items():
            pairs.append([check_key(key), encode_value(item, f"{path}/{key}", tensors)])
        return {"dict": pairs}
    if isinstance(value, list | tuple):
        items = [encode_value(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which is neither a tensor nor JSON")


def check_key(key: Any) -> str | int:
    """Return a key of a dict if JSON can represent it."""
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise TypeError(f"{key!r} is no key that JSON could give back")


def decode_value(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `encode_value` encoded."""
    if isinstance(value, list):
        return [decode_value(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: decode_value(item, tensors) for key, item in content}
        case "tuple":
            return tuple(decode_value(content, tensors))
        case "float":
            return float(content)
    raise KeyError(kind)


def unshare_memory(tensors: Tensors) -> Tensors:
    """Copy tensors that share memory with others, such as tied weights.

    safetensors does not write tensors that share memory.
    """
    used: set[int] = set()
    unshared: Tensors = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.clone() if address in used else tensor
        used.add(address)
    return unshared


def compute_crc32(text: str, tensors: Tensors) -> int:
    """Return a checksum of the tree, because safetensors only notices a wrong length."""
    checksum = crc32(text.encode())
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        checksum = crc32(data, checksum)
    return checksum
