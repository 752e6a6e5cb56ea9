"""Random numbers that depend on a seed and a count alone, and on nothing that was drawn elsewhere."""

from dataclasses import dataclass

import torch
from jaxtyping import Int8
from torch import Tensor
from torch import distributed as dist

from fp4dit.hadamard import random_signs
from fp4dit.training.projections import BLOCK

Signs = Int8[Tensor, "block"]


@dataclass
class Draws:
    """What the backward passes of a layer draw. `passes` counts them; set it, and the same numbers come again.

    Signs are the same on every machine and in every process, so that processes with a share of a batch each do what
    one does with all of it. What is rounded stochastically is so in each process on its own, lest errors add up.
    """

    seed: int = 0
    passes: int = 0

    def __call__(self, device: torch.device) -> tuple[Signs, Signs, torch.Generator]:
        """Of the next pass: signs for the product over output channels, for that over tokens, and a generator."""
        seed = 2_147_483_647 * self.seed + self.passes
        self.passes += 1
        over_outputs, over_tokens = random_signs(seed, 2 * BLOCK).to(device, non_blocking=True).split(BLOCK)
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        generator = torch.Generator(device).manual_seed((998_244_353 * seed + rank) % 2**63)
        return over_outputs, over_tokens, generator
