"""Precision and recall of sets (arXiv:1904.06991): fidelity and diversity apart."""

import torch

from fp4dit.metrics.perset import Pairs, Pairwise, Set

NEIGHBOURS = 3


class Precision(Pairwise):
    """The share of images that lie within the reach of a reference image: no farther from it than its 3rd neighbour."""

    higher_is_better = True
    layer = "pool"
    least = NEIGHBOURS + 1
    title = f"Precision, {NEIGHBOURS} neighbours, pool_3 of Inception-v3 (2015), arXiv:1904.06991"

    def pairs(self, x: Set, y: Set) -> Pairs:
        return torch.cdist(x, y)

    def number(self, images: Pairs, reference: Pairs, between: Pairs) -> float:
        return within_reach(between, reference)


class Recall(Precision):
    """The share of reference images that lie within the reach of an image."""

    title = Precision.title.replace("Precision", "Recall")

    def number(self, images: Pairs, reference: Pairs, between: Pairs) -> float:
        return within_reach(between.T, images)


def within_reach(distances: Pairs, of: Pairs) -> float:
    """The share of rows, each of distances to the points whose distances to one another are `of`."""
    reach = of.kthvalue(NEIGHBOURS + 1, 1).values  # each is its own nearest
    return (distances <= reach).any(1).double().mean().item()
