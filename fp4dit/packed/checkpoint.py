"""Whether the files of a packed checkpoint are what was written: checked before anything is made of them."""

import hashlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4dit.errors import UserError

VERSION = 1
LARGEST_HEADER = 100_000_000  # bytes, as in safetensors itself
DTYPES = {  # as safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, and the hash of what it is."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str


def digest(dtype: str, shape: Sequence[int], data: Any) -> str:
    """Of a tensor: safetensors' name of its dtype, its shape, its bytes."""
    made = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    made.update(data)
    return made.hexdigest()


def digest_of(value: Tensor) -> str:
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return digest(NAMES[value.dtype], value.shape, flat.numpy().data)


def metadata(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """What a packed checkpoint's files have in their headers: hashes of all tensors, and of the config that says what
    they mean."""
    tensors = {name: digest_of(value) for name, value in state.items()}
    return {"fp4dit": json.dumps({"version": VERSION, "config": fingerprint(config), "sha256": tensors})}


def fingerprint(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def verify(files: Iterable[Path], config: Mapping[str, Any]) -> dict[str, Stored]:
    """The tensors of a checkpoint that consists of these files, and is described by this config.

    Raises:
        UserError: if a file is damaged or of another version, or if a tensor or the config is not what was written. The
            message names the tensor. No memory of the size that a file claims is taken before.
    """
    found: dict[str, Stored] = {}
    written: dict[str, Any] = {}
    for path in files:
        with opened(path) as (header, data):
            written = said(path, header)
            for name, entry in header.items():
                if name != "__metadata__":
                    found[name] = stored(path, name, entry, data)
    expected = written.get("sha256", {})
    for name in expected.keys() - found.keys():
        raise UserError(f"the checkpoint lacks {name}: copy all of its files again")
    for name, own in found.items():
        if own.sha256 != expected.get(name):
            raise UserError(f"{name} of the checkpoint is not what was written: the file is damaged or was changed")
    if written.get("config") != fingerprint(config):
        raise UserError("quantization_config in the checkpoint's config.json is not what was written with its tensors")
    return found


@contextmanager
def opened(path: Path) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """The header of a safetensors file, and a view of what follows it."""
    with open(path, "rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, LARGEST_HEADER):
            raise UserError(f"{path} is cut off or no safetensors file: its header is not whole")
        try:
            header = json.loads(file.read(length), object_pairs_hook=distinct)
        except ValueError as error:
            raise UserError(f"{path} has a damaged header: {error}") from error
        if not isinstance(header, dict):
            raise UserError(f"{path} has a damaged header")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
            view[8 + length :] as data,
        ):
            yield header, data


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no name stands twice, for readers differ in which of them they take."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice")
    return found


def said(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says of itself."""
    try:
        found = json.loads(header["__metadata__"]["fp4dit"])
        version, hashes = found["version"], found["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not say that fp4dit wrote it: it is no packed checkpoint, or damaged") from error
    if version != VERSION:
        raise UserError(
            f"{path} is a packed checkpoint of version {version}, and this fp4dit reads version {VERSION}: install the "
            "fp4dit that wrote it, or export it again"
        )
    if not isinstance(hashes, dict):
        raise UserError(f"{path} has a damaged header")
    return found


def stored(path: Path, name: str, entry: Any, data: memoryview) -> Stored:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        fits = whole and start <= end <= len(data) and end - start == math.prod(shape) * DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} in {path} is damaged: {error!r}") from error
    if not fits:
        raise UserError(f"{name} in {path} does not fit the file: it is cut off or damaged")
    return Stored(DTYPES[dtype], shape, digest(dtype, shape, data[start:end]))
