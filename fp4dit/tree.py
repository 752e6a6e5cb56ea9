"""Nested dicts, lists and tuples of tensors and plain values, in one safetensors file and without pickle.

Each tensor is named by the path that leads to it; all else is JSON in the file's metadata.
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

from fp4dit.store import whole
from fp4dit.tensors import save_tensors

Tensors = dict[str, Tensor]


def save(value: Any, path: Path) -> None:
    """Raises OSError if the disk does not take it, and TypeError for a value that only pickle could keep."""
    tensors: Tensors = {}
    text = json.dumps(pack(value, "", tensors), allow_nan=False)
    tensors = separate(tensors)
    with whole(path) as part:
        save_tensors(tensors, part, {"tree": text, "crc32": str(checksum(text, tensors))})


def load(path: Path) -> Any:
    """Raises OSError if there is no such file, and ValueError if it is not as it was saved."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if int(about["crc32"]) != checksum(about["tree"], tensors):
            raise ValueError("its content is not what was saved")
        return unpack(json.loads(about["tree"]), tensors)
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def pack(value: Any, path: str, tensors: Tensors) -> Any:
    """JSON in which an object with one key tells what its value is; tensors go to `tensors`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):  # as pairs, for an optimizer counts its parameters with integers
        return {"dict": [[named(key), pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, float) and not isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which is neither a tensor nor JSON")


def named(key: Any) -> str | int:
    if isinstance(key, str | int) and not isinstance(key, bool):
        return key
    raise TypeError(f"{key!r} is no key that JSON could give back")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: unpack(item, tensors) for key, item in content}
        case "tuple":
            return tuple(unpack(content, tensors))
        case "float":
            return float(content)
    raise KeyError(kind)


def separate(tensors: Tensors) -> Tensors:
    """Each with memory of its own, for safetensors takes no two that share it, as tied weights do."""
    used: set[int] = set()
    own: Tensors = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in used else tensor
        used.add(place)
    return own


def checksum(text: str, tensors: Tensors) -> int:
    """safetensors has none, and notices only a length that is wrong."""
    found = crc32(text.encode())
    for name in sorted(tensors):
        found = crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return found
