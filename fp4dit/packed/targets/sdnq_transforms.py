"""Rotations and low-rank branches that SDNQ holds exactly.

Readers compute with one weight, (codes times scales + svd_up svd_down) H. Here the branch and the
rotation of the input stay apart, so that tensors are the same, and outputs equal but for rounding.
SDNQ's matrix H is the regular one if its order is a power of four, and Sylvester's if it is another
power of two.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fp4dit.packed.targets.base import FittedTransform, StoredLayer
from fp4dit.packed.targets.grid import matrix_shape
from fp4dit.transforms.base import Transform
from fp4dit.transforms.hadamard import (
    BlockRotation,
    Hadamard,
    HadamardRotation,
    RegularHadamard,
    is_power_of_four,
)
from fp4dit.transforms.low_rank import LowRank, LowRankBF16, LowRankBranch
from fp4dit.utils.errors import UserError

TRANSFORM_OPTIONS = ("use_hadamard", "hadamard_group_size", "use_svd", "svd_rank")

NO_TRANSFORMS: dict[str, Any] = {"use_svd": False, "use_hadamard": False}


def encode_transforms(
    transforms: Sequence[Transform],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a chain of transforms, and what the config says about it.

    Raises:
        UserError: if SDNQ has no such chain.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for i, transform in enumerate(transforms):
        if isinstance(transform, BlockRotation) and i == 0:
            size = len(transform.left) * len(transform.right)
            if isinstance(transform, HadamardRotation) and (
                not is_sylvester(size) or (transform.signs != 1).any()
            ):
                raise UserError(
                    f"it rotates blocks of {size}, and those of SDNQ are only the same without "
                    "signs and if the size is 2 times a power of four: use "
                    "transform=regular_hadamard or "
                    "transform=[{kind: hadamard, size: 32, signs: false}]"
                )
            settings |= {"use_hadamard": True, "hadamard_group_size": size}
        elif isinstance(transform, LowRankBranch) and not tensors:
            tensors = {
                "svd_up": transform.up.cpu(),
                "svd_down": transform.down.cpu(),
            }
            settings |= {"use_svd": True, "svd_rank": transform.rank}
        else:
            names = ", ".join(type(transform).__name__ for transform in transforms)
            raise UserError(
                f"it transforms its input ({names}), and SDNQ has a Hadamard rotation and then a "
                "low-rank branch: use transform=none"
            )
    return tensors, settings


def is_sylvester(size: int) -> bool:
    """Return whether SDNQ's matrix of this order is Sylvester's, and not the regular one."""
    return size >= 8 and size.bit_count() == 1 and not is_power_of_four(size)


def find_block_size(k: int, size: int) -> int:
    """Return the size of blocks that SDNQ rotates if it is asked for `size`; 0 if it does not."""
    size = 1 << (min(k, size) - 1).bit_length()
    while k % size:
        size //= 2
    return size if size >= 4 else 0


def restore_transforms(stored: StoredLayer) -> list[FittedTransform]:
    """Return the rotation and the branch of a layer.

    Raises:
        UserError: if the numbers of the branch are neither of fp16 nor of bf16.
    """
    rows, k = matrix_shape(stored.shape)
    fitted: list[FittedTransform] = []
    if stored.settings.get("use_hadamard"):
        size = find_block_size(k, stored.settings.get("hadamard_group_size", 256))
        if size:
            is_regular = is_power_of_four(size)
            spec = RegularHadamard(size) if is_regular else Hadamard(size, signs=False)
            fitted.append((spec, spec(rows, k)))
    if "svd_up" in stored.tensors:
        fitted.append(restore_branch(stored.tensors["svd_up"], stored.tensors["svd_down"], k))
    return fitted


def restore_branch(up: Tensor, down: Tensor, k: int) -> FittedTransform:
    """Return a branch with these factors."""
    if up.ndim != 2 or down.ndim != 2 or up.shape[1] != len(down) or down.shape[1] != k:
        raise UserError(f"its branch is {list(up.shape)} times {list(down.shape)}")
    for kind in (LowRank, LowRankBF16):
        spec = kind(len(down))
        branch = spec(len(up), k)
        if branch.up.shape == up.shape and all(
            x.to(kind.dtype).to(x.dtype).equal(x) for x in (up, down)
        ):
            branch.up.copy_(up)
            branch.down.copy_(down)
            return spec, branch
    raise UserError("the numbers of its branch are neither of fp16 nor of bf16")
