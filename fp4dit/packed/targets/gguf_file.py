"""The container GGUF (version 3): named tensors and key-value pairs, little-endian.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md specifies it.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fp4dit.packed.encoding.integrity import hash_config, hash_tensor_bytes
from fp4dit.utils.errors import UserError

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32

MAX_DIMENSIONS = 4

CHECKSUMS = "fp4dit.sha256"  # the key of the checksums that fp4dit writes

STRING, ARRAY = 8, 9

VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@dataclass(frozen=True)
class TensorType:
    """A type of tensors.

    Attributes:
        code: Its number in files.
        block: The number of values in a block.
        size: The bytes of a block.
        dtype: The torch dtype of plain tensors; None for blocks, which are bytes.
    """

    code: int
    block: int
    size: int
    dtype: torch.dtype | None = None


TYPES = {
    "F32": TensorType(0, 1, 4, torch.float32),
    "F16": TensorType(1, 1, 2, torch.float16),
    "BF16": TensorType(30, 1, 2, torch.bfloat16),
    "Q4_0": TensorType(2, 32, 18),
    "Q4_1": TensorType(3, 32, 20),
    "Q8_0": TensorType(8, 32, 34),
}

TYPE_NAMES = {kind.code: name for name, kind in TYPES.items()}


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        kind: The name of its type, a key of `TYPES`.
        data: A plain tensor, or the bytes of its blocks, a row for each row.
    """

    kind: str
    data: Tensor


def write_gguf(tensors: Mapping[str, GGUFTensor], config: Mapping[str, Any], path: Path) -> None:
    """Write tensors to a file, with checksums of all of them and of a config."""
    hashes = {name: hash_gguf_tensor(tensor) for name, tensor in tensors.items()}
    about = {"config": hash_config(config), "tensors": hashes}
    pairs = {"general.architecture": "diffusion", CHECKSUMS: json.dumps(about)}
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(pairs)))
    for key, value in pairs.items():
        head += pack_string(key) + struct.pack("<I", STRING) + pack_string(value)
    offset = 0
    for name, tensor in tensors.items():
        kind, shape = TYPES[tensor.kind], list(tensor.data.shape)
        if kind.dtype is None:
            shape[-1] = shape[-1] // kind.size * kind.block
        head += pack_string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind.code, offset)
        offset += pad(tensor.data.nbytes)
    with open(path, "wb") as file:
        file.write(head.ljust(pad(len(head)), b"\0"))
        for tensor in tensors.values():
            data = tensor_bytes(tensor.data)
            file.write(data)
            file.write(bytes(pad(len(data)) - len(data)))


def read_gguf(path: Path, config: Mapping[str, Any]) -> dict[str, GGUFTensor]:
    """Read the tensors of a file. If it has checksums of fp4dit, they are verified.

    No memory of a size that the file claims is allocated before the claim is checked.

    Raises:
        UserError: if the file is damaged, has a type that is not read, or was changed.
    """
    try:
        with open(path, "rb") as file:
            tensors, pairs = Reader(file, path.stat().st_size).read()
    except (struct.error, ValueError, OverflowError) as error:
        raise UserError(f"{path} is damaged, or not a GGUF file that is read: {error}") from error
    if CHECKSUMS in pairs:
        verify_checksums(path, tensors, pairs[CHECKSUMS], config)
    return tensors


def verify_checksums(
    path: Path, tensors: Mapping[str, GGUFTensor], text: str, config: Mapping[str, Any]
) -> None:
    """Raise a UserError if a tensor or the config is not what was written."""
    try:
        about = json.loads(text)
        hashes, config_hash = dict(about["tensors"]), about["config"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} has damaged checksums: {error}") from error
    for name in {*hashes, *tensors}:
        if name not in tensors or hash_gguf_tensor(tensors[name]) != hashes.get(name):
            raise UserError(f"{name} in {path} is not what was written: it is damaged or changed")
    if hash_config(config) != config_hash:
        raise UserError(f"config.json beside {path} is not what was written with it")


@dataclass
class Reader:
    """Reads the head of a file, and the tensors that it lists.

    Args:
        file: The file, at its start.
        size: Its size in bytes.
    """

    file: BinaryIO
    size: int

    def read(self) -> tuple[dict[str, GGUFTensor], dict[str, str]]:
        """Return the tensors by name, and the strings among the key-value pairs.

        Raises:
            ValueError: if the file is damaged, or has something that is not read.
        """
        if self.file.read(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensor_count, pair_count = self.unpack("<IQQ")
        if version not in (2, VERSION):
            raise ValueError(f"it has version {version}")
        pairs, alignment = {}, ALIGNMENT
        for _ in range(self.check_count(pair_count, 13)):
            key, value = self.read_string(), self.read_value(*self.unpack("<I"))
            if isinstance(value, str):
                pairs[key] = value
            if key == "general.alignment":
                alignment = int.from_bytes(value, "little") if isinstance(value, bytes) else 0
        entries = [self.read_entry() for _ in range(self.check_count(tensor_count, 33))]
        if not 0 < alignment <= self.size:
            raise ValueError(f"its alignment is {alignment}")
        start, tensors = -(-self.file.tell() // alignment) * alignment, {}
        for name, shape, code, offset in entries:
            if name in tensors:
                raise ValueError(f"the name {name} is repeated")
            tensors[name] = self.read_tensor(name, shape, code, start + offset)
        return tensors, pairs

    def read_entry(self) -> tuple[str, list[int], int, int]:
        """Return the name, the shape, the type and the offset of a tensor."""
        name, (count,) = self.read_string(), self.unpack("<I")
        if count > MAX_DIMENSIONS:
            raise ValueError(f"{name} has {count} dimensions")
        shape = list(reversed(self.unpack(f"<{count}Q")))
        code, offset = self.unpack("<IQ")
        return name, shape, code, offset

    def read_tensor(self, name: str, shape: list[int], code: int, start: int) -> GGUFTensor:
        """Return a tensor whose data begin at `start`."""
        if code not in TYPE_NAMES:
            raise ValueError(f"{name} has type {code}, and only {', '.join(TYPES)} are read")
        kind = TYPES[TYPE_NAMES[code]]
        row = shape[-1] if shape else 1
        if row % kind.block:
            raise ValueError(f"the rows of {name} are not whole blocks")
        size = prod(shape) // kind.block * kind.size
        if start + size > self.size:
            raise ValueError(f"{name} is cut off")
        self.file.seek(start)
        data = torch.frombuffer(bytearray(self.file.read(size) or b"\0"), dtype=torch.uint8)[:size]
        if kind.dtype:
            return GGUFTensor(TYPE_NAMES[code], data.view(kind.dtype).view(shape))
        return GGUFTensor(TYPE_NAMES[code], data.view(*shape[:-1], row // kind.block * kind.size))

    def read_value(self, kind: int) -> str | bytes | None:
        """Return a string or the bytes of a number, or skip an array."""
        if kind == STRING:
            return self.read_string()
        if kind in VALUE_SIZES:
            return self.take(VALUE_SIZES[kind])
        if kind != ARRAY:
            raise ValueError(f"it has a value of type {kind}")
        item, count = self.unpack("<IQ")
        if item in VALUE_SIZES:
            self.take(self.check_count(count, VALUE_SIZES[item]) * VALUE_SIZES[item])
        elif item == STRING:
            for _ in range(self.check_count(count, 8)):
                self.read_string()
        else:
            raise ValueError("it has an array of arrays")
        return None

    def read_string(self) -> str:
        """Return a string."""
        (length,) = self.unpack("<Q")
        return self.take(length).decode()

    def unpack(self, layout: str) -> tuple[int, ...]:
        """Return numbers."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def take(self, count: int) -> bytes:
        """Return the next bytes."""
        if count > self.size - self.file.tell():
            raise ValueError("it is cut off")
        return self.file.read(count)

    def check_count(self, count: int, least: int) -> int:
        """Return a count of things that take at least so many bytes each."""
        if count * least > self.size:
            raise ValueError(f"it says that {count} entries follow")
        return count


def pack_string(text: str) -> bytes:
    """Return a string as GGUF stores it."""
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def pad(size: int) -> int:
    """Return a size, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def tensor_bytes(data: Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return data.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def hash_gguf_tensor(tensor: GGUFTensor) -> str:
    """Return the SHA-256 of a tensor."""
    return hash_tensor_bytes(tensor.kind, tensor.data.shape, tensor_bytes(tensor.data))
