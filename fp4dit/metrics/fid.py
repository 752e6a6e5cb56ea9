"""Fréchet Inception distance (arXiv:1706.08500), and that of spatial features."""

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.perset import Set, SetMetric


class Fid(SetMetric):
    """Distance of the Gaussians through Inception's pooled features of both sets; 0 for equal ones."""

    higher_is_better = False
    layer = "pool"
    title = "FID, pool_3 of Inception-v3 (2015), arXiv:1706.08500"

    def value(self, images: Set, reference: Set) -> float:
        return frechet(images, reference)


class Sfid(Fid):
    """The same of the first 7 channels of mixed_6/conv, at each place (arXiv:2103.03841)."""

    layer = "spatial"
    title = "sFID, 7 channels of mixed_6/conv of Inception-v3 (2015), arXiv:2103.03841"


def frechet(x: Set, y: Set) -> float:
    """|mean x - mean y|^2 + tr(A + B - 2 (A B)^(1/2)) of the covariances A and B."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    distance = (x.mean(0) - y.mean(0)).square().sum()
    return (distance + a.square().sum() + b.square().sum() - 2 * trace_of_root(a, b)).item()


def trace_of_root(a: Set, b: Set) -> Float[Tensor, ""]:
    """tr((A B)^(1/2)) of A = a^T a and B = b^T b: the sum of the singular values of a b^T, since A B and
    (a b^T)(a b^T)^T have the same eigenvalues but for zeros. Where there are more rows than columns, triangular
    factors have the same squares and fewer rows."""
    if min(len(a), len(b)) > a.shape[1]:
        a, b = (torch.linalg.qr(z, mode="r").R for z in (a, b))
    return torch.linalg.matrix_norm(a @ b.T, ord="nuc")
