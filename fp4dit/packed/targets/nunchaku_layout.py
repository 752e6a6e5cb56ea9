"""The order of the values in Nunchaku's tensors, which its kernels read in tiles.

A tensor is divided into parts whose sizes are a `Tiling`, and the parts are stored in another
order. The tilings are those of DeepCompressor's converter, which `docs/nunchaku_weight_packing.md`
of diffuse-compressor describes; AWQ's is TinyChat's. All sizes are multiples of `TILE`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from fp4dit.utils.bitpack import pack_bits, unpack_bits

TILE = 128  # outputs of a tile; the kernels unroll two tiles of 64 inputs

LOW_RANK_TILE = 16


@dataclass(frozen=True)
class Tiling:
    """A tensor's division into parts, and the order in which they are stored.

    Attributes:
        sizes: The sizes of the parts, in the order of the tensor. Zero is what the others leave.
        order: The indices of the parts, in the order of the file.

    Example:
        >>> Tiling((0, 2), (1, 0)).arrange(torch.arange(6))
        tensor([0, 2, 4, 1, 3, 5])
    """

    sizes: Sequence[int]
    order: Sequence[int]

    def arrange(self, x: Tensor) -> Tensor:
        """Return the values in the order of the file, as a vector."""
        return x.reshape(self.find_sizes(x.numel())).permute(*self.order).flatten()

    def restore(self, x: Tensor) -> Tensor:
        """Return the values in the order of the tensor, as a vector."""
        sizes = self.find_sizes(x.numel())
        stored = x.reshape([sizes[i] for i in self.order])
        return stored.permute(*[self.order.index(i) for i in range(len(sizes))]).flatten()

    def find_sizes(self, count: int) -> list[int]:
        """Return the sizes of the parts of a tensor of `count` values."""
        known = prod(size for size in self.sizes if size)
        return [size or count // known for size in self.sizes]


def weight_tiling(k: int) -> Tiling:
    """Return the tiling of 4-bit codes of k inputs: tiles of 128 outputs and 64 inputs."""
    return Tiling((0, 8, 2, 8, k // 64, 2, 4, 8), (0, 4, 1, 3, 6, 2, 5, 7))


def scale_tiling(groups: int) -> Tiling:
    """Return the tiling of numbers for each output and group of inputs. A vector has one group."""
    return Tiling((0, 8, 2, 4, 2, groups), (0, 5, 1, 3, 2, 4))


def micro_scale_tiling(groups: int) -> Tiling:
    """Return the tiling of E4M3 scales, four of which belong to 64 inputs."""
    return Tiling((0, 4, 4, 8, groups // 4, 4), (0, 4, 3, 2, 1, 5))


def down_tiling(k: int) -> Tiling:
    """Return the tiling of the factor of a branch that reads k inputs, of r rows."""
    return Tiling((0, 2, 8, k // LOW_RANK_TILE, 2, 4, 2), (3, 0, 2, 5, 1, 4, 6))


def up_tiling(rank: int) -> Tiling:
    """Return the tiling of the factor of a branch that writes the outputs, of `rank` columns."""
    return Tiling((0, 2, 8, rank // LOW_RANK_TILE, 2, 4, 2), (0, 3, 2, 5, 1, 4, 6))


def awq_tiling(k: int) -> Tiling:
    """Return the tiling of AWQ's 4-bit codes of k inputs: 4 outputs and 64 inputs."""
    return Tiling((0, 4, k // 64, 2, 4, 8), (0, 2, 1, 3, 5, 4))


def pack_codes(codes: Tensor, tiling: Tiling, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return codes from 0 to 15, two in a byte, the first in the low half."""
    arranged = tiling.arrange(codes.to(torch.uint8))
    return pack_bits(arranged, 4).view(dtype).view(*shape)


def unpack_codes(packed: Tensor, tiling: Tiling, shape: tuple[int, int]) -> Tensor:
    """Undo `pack_codes`."""
    data = packed.contiguous().flatten().view(torch.uint8)
    return tiling.restore(unpack_bits(data, 4, prod(shape))).view(shape)
