"""The order in which the tensor cores of Blackwell GPUs read scales of blocks.

Scales of 128 rows and 4 blocks are 512 consecutive bytes: 16 for each of 32 rows, which hold the
scales of this row and of those 32, 64 and 96 below. The matrix is filled up with zeros to whole
tiles. cuBLAS documents the order as the block scaling factors layout of 1D block scaling.
"""

import torch
from torch import Tensor

from fp4dit.utils.errors import UserError

ROWS, BLOCKS = 128, 4


def swizzle(scales: Tensor) -> Tensor:
    """Return a matrix of scales of 8 bits in this order, filled up to whole tiles."""
    rows, blocks = (
        -(-size // tile) for size, tile in zip(scales.shape, (ROWS, BLOCKS), strict=True)
    )
    padded = torch.zeros(rows * ROWS, blocks * BLOCKS, dtype=torch.uint8)
    padded[: len(scales), : scales.shape[1]] = scales.view(torch.uint8)
    tiles = padded.view(rows, 4, 32, blocks, BLOCKS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scales.dtype)


def unswizzle(scales: Tensor, shape: tuple[int, int]) -> Tensor:
    """Undo `swizzle`.

    Args:
        scales: The scales, of any shape.
        shape: The shape of the matrix.

    Raises:
        UserError: if there are not as many scales as whole tiles have.
    """
    rows, blocks = (-(-size // tile) for size, tile in zip(shape, (ROWS, BLOCKS), strict=True))
    if scales.numel() != rows * ROWS * blocks * BLOCKS:
        raise UserError(f"there are {scales.numel()} scales for a matrix {list(shape)} of blocks")
    tiles = scales.contiguous().view(torch.uint8).view(rows, blocks, 32, 4, BLOCKS)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(rows * ROWS, blocks * BLOCKS)
    return padded[: shape[0], : shape[1]].contiguous().view(scales.dtype)
