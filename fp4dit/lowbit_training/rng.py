"""Random numbers of backward passes, which depend only on a seed and the number of the pass."""

from dataclasses import dataclass

import torch
from jaxtyping import Int8
from torch import Tensor
from torch import distributed as dist

from fp4dit.lowbit_training.operand_quant import ROTATION_SIZE
from fp4dit.transforms.hadamard import random_signs

BlockSigns = Int8[Tensor, "block"]


@dataclass
class BackwardRng:
    """Random signs and generators for the backward passes of a layer.

    The signs are the same on every machine and in every process, so that processes with a share of
    a batch each compute what one process does with all of it. The generators of stochastic
    rounding differ by process, so that rounding errors do not add up.

    Args:
        seed: Seed.
        num_passes: Backward passes so far. Set it to resume a training.

    Example:
        >>> rng = BackwardRng(seed=0)
        >>> output_signs, token_signs, generator = rng(torch.device("cpu"))
        >>> rng.num_passes
        1
    """

    seed: int = 0
    num_passes: int = 0

    def __call__(self, device: torch.device) -> tuple[BlockSigns, BlockSigns, torch.Generator]:
        """Return the random numbers of the next pass.

        Returns:
            The signs for the product over output channels, those for the product over tokens, and
            a generator on `device`.
        """
        seed = 2_147_483_647 * self.seed + self.num_passes
        self.num_passes += 1
        signs = random_signs(seed, 2 * ROTATION_SIZE).to(device, non_blocking=True)
        output_signs, token_signs = signs.split(ROTATION_SIZE)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        generator = torch.Generator(device).manual_seed((998_244_353 * seed + rank) % 2**63)
        return output_signs, token_signs, generator
