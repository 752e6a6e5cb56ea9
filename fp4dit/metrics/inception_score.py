"""Inception score (arXiv:1606.03498): how sure Inception is of each image, and how unlike they are."""

from itertools import pairwise

from fp4dit.metrics.base import Extractor, Features
from fp4dit.metrics.perset import Set, SetMetric


class InceptionScore(SetMetric):
    """exp of the mean divergence of each image's classes from those of all; the mean over `splits` of the images as
    they come. Needs no reference."""

    higher_is_better = True
    layer = "logits"
    title = "Inception score of Inception-v3 (2015), arXiv:1606.03498"

    def __init__(self, extractor: Extractor, splits: int = 10, resamples: int = 100) -> None:
        super().__init__(extractor, None, resamples)
        self.compares, self.splits, self.least = False, splits, splits
        self.about += f", {splits} splits"

    def value(self, images: Set, reference: Set) -> float:
        log = images.log_softmax(1)
        ends = [i * len(log) // self.splits for i in range(self.splits + 1)]
        return sum(self.score(log[a:b]) for a, b in pairwise(ends)) / self.splits

    def score(self, log: Set) -> float:
        classes = log.exp().mean(0)
        return (log.exp() * (log - classes.log())).sum(1).mean().exp().item()

    def against(self, count: int) -> str:
        return f"{count}"

    def other(self, images: Set, reference: Features | None) -> Set:
        return images[:0]
