"""Integrity of packed checkpoints: hashes of all tensors, verified before a tensor is used."""

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

from fp4dit.utils.errors import UserError

# Raise it if a field of a checkpoint's JSON or the meaning of its bytes changes: older checkpoints
# are then refused. Raise `export.version` in conf/stages/default.yaml too, or stored exports are
# reused.
VERSION = 2

MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself

DTYPES = {  # by their names in safetensors
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Dtype, shape and hash of a tensor in a file.

    Attributes:
        dtype: The dtype of the tensor.
        shape: The shape of the tensor.
        sha256: The hash that `hash_tensor` computes, in hexadecimal digits.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str


def hash_tensor_bytes(dtype: str, shape: Sequence[int], data: Any) -> str:
    """Return the SHA-256 of a tensor: its dtype's name in safetensors, its shape and its bytes."""
    sha256 = hashlib.sha256(f"{dtype} {list(shape)} ".encode())
    sha256.update(data)
    return sha256.hexdigest()


def hash_tensor(value: Tensor) -> str:
    """Return the SHA-256 of a tensor in memory."""
    flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hash_tensor_bytes(DTYPE_NAMES[value.dtype], value.shape, flat.numpy().data)


def build_metadata(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, str]:
    """Build the metadata of a checkpoint's files: hashes of all tensors and of the config."""
    hashes = {name: hash_tensor(value) for name, value in state.items()}
    metadata = {"version": VERSION, "config": hash_config(config), "sha256": hashes}
    return {"fp4dit": json.dumps(metadata)}


def hash_config(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a config, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def verify_files(files: Iterable[Path], config: Mapping[str, Any]) -> dict[str, StoredTensor]:
    """Verify all files of a checkpoint, and return its tensors by name.

    No memory of a size that a file claims is allocated before the claim is checked.

    Args:
        config: The `quantization_config` of the checkpoint.

    Raises:
        UserError: if a file is damaged or has another version, or if a tensor or the config was
            changed. The message contains the name of the tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    metadata: dict[str, Any] = {}
    for path in files:
        with open_safetensors(path) as (header, data):
            metadata = read_metadata(path, header)
            for name, entry in header.items():
                if name != "__metadata__":
                    tensors[name] = read_stored_tensor(path, name, entry, data)
    hashes = metadata.get("sha256", {})
    for name in hashes.keys() - tensors.keys():
        raise UserError(f"the checkpoint lacks {name}: copy all of its files again")
    for name, tensor in tensors.items():
        if tensor.sha256 != hashes.get(name):
            raise UserError(
                f"{name} of the checkpoint is not what was written: the file is damaged or was "
                "changed"
            )
    if metadata.get("config") != hash_config(config):
        raise UserError(
            "quantization_config in the checkpoint's config.json is not what was written with its "
            "tensors: the file was changed"
        )
    return tensors


@contextmanager
def open_safetensors(path: Path) -> Iterator[tuple[dict[str, Any], memoryview]]:
    """Open a safetensors file and yield its header and a view of the data.

    Raises:
        UserError: if the header is damaged.
    """
    with open(path, "rb") as file:
        size = path.stat().st_size
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, MAX_HEADER_BYTES):
            raise UserError(
                f"{path} is cut off or not a safetensors file: its header is incomplete"
            )
        try:
            header = json.loads(file.read(length), object_pairs_hook=reject_repeated_keys)
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


def reject_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict.

    Raises:
        ValueError: if a key is repeated, because readers differ in which value they take.
    """
    json_object = dict(pairs)
    if len(json_object) != len(pairs):
        raise ValueError("a name is repeated")
    return json_object


def read_metadata(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return fp4dit's metadata of a file.

    Raises:
        UserError: if there is none, or if it has another version.
    """
    try:
        metadata = json.loads(header["__metadata__"]["fp4dit"])
        version, hashes = metadata["version"], metadata["sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not say that fp4dit wrote it: it is not a packed checkpoint, or it is "
            "damaged"
        ) from error
    if version != VERSION:
        raise UserError(
            f"{path} is a packed checkpoint of version {version}, and this fp4dit reads version "
            f"{VERSION}: install the fp4dit that wrote it, or export it again"
        )
    if not isinstance(hashes, dict):
        raise UserError(f"{path} has a damaged header")
    return metadata


def read_stored_tensor(path: Path, name: str, entry: Any, data: memoryview) -> StoredTensor:
    """Check a tensor's entry in the header against the size of the file, and hash the tensor.

    Raises:
        UserError: if the entry is damaged, or does not fit the file.
    """
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        are_counts = all(type(n) is int and n >= 0 for n in (*shape, start, end))
        in_file = are_counts and start <= end <= len(data)
        fits = in_file and end - start == math.prod(shape) * DTYPES[dtype].itemsize
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name} in {path} is damaged: {error!r}") from error
    if not fits:
        raise UserError(f"{name} in {path} does not fit the file: it is cut off or damaged")
    sha256 = hash_tensor_bytes(dtype, shape, data[start:end])
    return StoredTensor(DTYPES[dtype], shape, sha256)
