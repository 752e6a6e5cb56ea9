"""Layers of ComfyUI that rotate their input in groups of channels (ConvRot, arXiv:2512.03673)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from fp4dit.packed.targets.base import FittedTransform, StoredLayer
from fp4dit.packed.targets.grid import matrix_shape
from fp4dit.transforms.base import Transform
from fp4dit.transforms.hadamard import BlockRotation, RegularHadamard, is_power_of_four
from fp4dit.utils.bitpack import pack_bits, unpack_bits
from fp4dit.utils.errors import UserError

INT4_ROTATED = "convrot_w4a4"

INT4_GROUP = 64  # kernels read so many codes at a time

DEFAULT_SIZE = 256  # of the blocks, if a marker does not say it


def encode_rotation(transforms: Sequence[Transform]) -> int | None:
    """Return the channels per block that a layer rotates; None if it does not transform its input.

    Raises:
        UserError: if ComfyUI has no such transform.
    """
    if not transforms:
        return None
    if len(transforms) == 1 and type(transforms[0]) is BlockRotation:
        return len(transforms[0].left) * len(transforms[0].right)
    names = ", ".join(type(transform).__name__ for transform in transforms)
    raise UserError(
        f"it transforms its input ({names}), and ComfyUI has regular rotations of INT4 and INT8 in "
        "rows: use transform=regular_hadamard or transform=none"
    )


def rotation_settings(fmt: str, size: int | None) -> dict[str, Any]:
    """Return what the marker of a layer says about its rotation."""
    if size is None:
        return {}
    return {**({} if fmt == INT4_ROTATED else {"convrot": True}), "convrot_groupsize": size}


def read_rotation(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a marker says about the rotation of a layer, as `rotation_settings` does.

    Raises:
        UserError: if there is no such rotation here.
    """
    fmt, is_rotated = settings["format"], settings.get("convrot", False)
    if fmt != INT4_ROTATED and not is_rotated:
        return {}
    size = settings.get("convrot_groupsize", DEFAULT_SIZE)
    if fmt not in (INT4_ROTATED, "int8_tensorwise") or not is_power_of_four(size):
        raise UserError(f"{name} is {fmt}, rotated by groups of {size}, which is not read")
    return rotation_settings(fmt, size)


def restore_rotation(stored: StoredLayer) -> list[FittedTransform]:
    """Return the rotation of a layer.

    Raises:
        UserError: if its blocks do not divide the row.
    """
    size = stored.settings.get("convrot_groupsize")
    if size is None:
        return []
    rows, k = matrix_shape(stored.shape)
    if k % size:
        raise UserError(f"it is rotated by groups of {size}, which do not divide {k}")
    spec = RegularHadamard(size)
    return [(spec, spec(rows, k))]


def pack_int4(points: Float[Tensor, "o k"]) -> Int8[Tensor, "o b"]:
    """Return two signed integers in a byte, the first in its low half.

    Raises:
        UserError: if the rows are too short for ComfyUI's kernels.
    """
    if points.shape[1] % INT4_GROUP:
        raise UserError(f"its inputs are not multiples of {INT4_GROUP}")
    return pack_bits((points.int() & 15).to(torch.uint8), 4).view(torch.int8)


def unpack_int4(codes: Int8[Tensor, "o b"], k: int) -> Float[Tensor, "o k"]:
    """Return the integers that `pack_int4` packed."""
    nibbles = unpack_bits(codes.view(torch.uint8), 4, k).int()
    return ((nibbles ^ 8) - 8).float()
