"""Kernel distances of two sets: KID on Inception's features, CMMD on CLIP's."""

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.perset import Pairs, Pairwise, Set


class Kid(Pairwise):
    """Unbiased estimate of the squared distance under the kernel (x y / d + 1)^3 (arXiv:1801.01401), from all pairs of
    images rather than from random subsets of 1,000. May be below 0."""

    higher_is_better = False
    layer = "pool"
    title = "KID from all pairs, pool_3 of Inception-v3 (2015), arXiv:1801.01401"

    def pairs(self, x: Set, y: Set) -> Pairs:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def number(self, images: Pairs, reference: Pairs, between: Pairs) -> float:
        return (apart(images) + apart(reference) - 2 * between.mean()).item()


def apart(kernel: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The mean over pairs of two."""
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))


class Cmmd(Pairwise):
    """1000 times the squared distance of CLIP's embeddings under a Gaussian kernel of width 10, as its authors estimate
    it (arXiv:2401.09603); 0 for equal sets."""

    higher_is_better = False
    layer = "embedding"
    title = "CMMD, 1000 x squared distance, Gaussian kernel of width 10, arXiv:2401.09603"

    def pairs(self, x: Set, y: Set) -> Pairs:
        return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 10**2))

    def number(self, images: Pairs, reference: Pairs, between: Pairs) -> float:
        return 1000 * (images.mean() + reference.mean() - 2 * between.mean()).item()
