"""Precision and recall of sets (arXiv:1904.06991): fidelity and diversity apart."""

import torch
from jaxtyping import Bool
from torch import Tensor

from fp4dit.metrics.perset import Set, SetMetric

NEIGHBOURS = 3


class Precision(SetMetric):
    """The share of images that lie within the reach of a reference image: no farther from it than its 3rd neighbour."""

    higher_is_better = True
    layer = "pool"
    least = NEIGHBOURS + 1
    title = f"Precision, {NEIGHBOURS} neighbours, pool_3 of Inception-v3 (2015), arXiv:1904.06991"

    def value(self, images: Set, reference: Set) -> float:
        return within_reach(images, reference).double().mean().item()


class Recall(Precision):
    """The share of reference images that lie within the reach of an image."""

    title = Precision.title.replace("Precision", "Recall")

    def value(self, images: Set, reference: Set) -> float:
        return within_reach(reference, images).double().mean().item()


def within_reach(x: Set, of: Set) -> Bool[Tensor, " n"]:
    reach = torch.cdist(of, of).kthvalue(NEIGHBOURS + 1, 1).values  # each is its own nearest
    return (torch.cdist(x, of) <= reach).any(1)
