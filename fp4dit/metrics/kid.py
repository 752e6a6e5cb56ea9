"""Kernel distances of two sets: KID on Inception's features, CMMD on CLIP's."""

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.perset import Set, SetMetric


class Kid(SetMetric):
    """Unbiased estimate of the squared distance under the kernel (x y / d + 1)^3 (arXiv:1801.01401), from all pairs of
    images rather than from random subsets of 1,000. May be below 0."""

    higher_is_better = False
    layer = "pool"
    title = "KID from all pairs, pool_3 of Inception-v3 (2015), arXiv:1801.01401"

    def value(self, images: Set, reference: Set) -> float:
        kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
        inside = apart(kernel(images, images)) + apart(kernel(reference, reference))
        return (inside - 2 * kernel(images, reference).mean()).item()


def apart(kernel: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """The mean over pairs of two."""
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))


class Cmmd(SetMetric):
    """1000 times the squared distance of CLIP's embeddings under a Gaussian kernel of width 10, as its authors estimate
    it (arXiv:2401.09603); 0 for equal sets."""

    higher_is_better = False
    layer = "embedding"
    title = "CMMD, 1000 x squared distance, Gaussian kernel of width 10, arXiv:2401.09603"

    def value(self, images: Set, reference: Set) -> float:
        kernel = lambda x, y: torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 10**2)).mean()
        return 1000 * (kernel(images, images) + kernel(reference, reference) - 2 * kernel(images, reference)).item()
