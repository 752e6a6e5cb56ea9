"""Set metrics of Inception-v3: the Fréchet distances FID and sFID, and the Inception score.

Equations: FID = |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) of the means m, n and covariances A, B of the
features of two sets (arXiv:1706.08500), and IS = exp(E_x KL(p(y|x) || p(y))) (arXiv:1606.03498).
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.base import FeatureExtractor, Features
from fp4dit.metrics.set_metric import FeatureMatrix, FeatureSetMetric


class FID(FeatureSetMetric):
    """Fréchet distance of the Gaussians fitted to Inception's pooled features of two sets.

    It is 0 for equal sets.

    Example:
        >>> fid = FID(InceptionFeatures("/path/of/weights-inception-2015-12-05.pth"))
        >>> fid.estimate({"pool": features}, {"pool": reference_features}).mean
        16.6
    """

    title, digits, higher_is_better = "FID", 1, False
    layer = "pool"
    definition = "FID, pool_3 of Inception-v3 (2015), arXiv:1706.08500"

    def compute_value(self, images: FeatureMatrix, reference: FeatureMatrix) -> float:
        return frechet_distance(images, reference)


class SpatialFID(FID):
    """sFID: FID on the first 7 channels of mixed_6/conv at each position (arXiv:2103.03841)."""

    title = "sFID"
    layer = "spatial"
    definition = "sFID, 7 channels of mixed_6/conv of Inception-v3 (2015), arXiv:2103.03841"


class InceptionScore(FeatureSetMetric):
    """exp of the mean KL divergence of each image's class probabilities from their mean.

    The score is the mean over consecutive splits of the images. It has no reference.

    Args:
        extractor: Recipe of the network.
        splits: Number of splits.
        resamples: Number of bootstrap resamples of the interval.

    Example:
        >>> InceptionScore(extractor, splits=10).estimate({"logits": logits}, None).mean
        278.5
    """

    title, digits, higher_is_better = "IS", 1, True
    layer = "logits"
    definition = "Inception score of Inception-v3 (2015), arXiv:1606.03498"

    def __init__(self, extractor: FeatureExtractor, splits: int = 10, resamples: int = 100) -> None:
        super().__init__(extractor, None, resamples)
        self.compares_to_reference, self.splits, self.min_images = False, splits, splits
        self.about += f", {splits} splits"

    def compute_value(self, images: FeatureMatrix, reference: FeatureMatrix) -> float:
        log_probs = images.log_softmax(1)
        ends = [i * len(log_probs) // self.splits for i in range(self.splits + 1)]
        scores = [self.score_split(log_probs[start:end]) for start, end in pairwise(ends)]
        return sum(scores) / self.splits

    def score_split(self, log_probs: FeatureMatrix) -> float:
        """Return the score of one split, from its log-probabilities of the classes."""
        mean_probs = log_probs.exp().mean(0)
        divergence = (log_probs.exp() * (log_probs - mean_probs.log())).sum(1)
        return divergence.mean().exp().item()

    def describe_reference(self, count: int) -> str:
        return f"{count}"

    def reference_features(
        self, images: FeatureMatrix, reference: Features | None
    ) -> FeatureMatrix:
        return images[:0]


def frechet_distance(x: FeatureMatrix, y: FeatureMatrix) -> float:
    """Return |mean x - mean y|^2 + tr(A + B - 2 (A B)^(1/2)) of the covariances A and B."""
    a = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    b = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    distance = (x.mean(0) - y.mean(0)).square().sum()
    root = trace_of_product_root(a, b)
    return (distance + a.square().sum() + b.square().sum() - 2 * root).item()


def trace_of_product_root(a: FeatureMatrix, b: FeatureMatrix) -> Float[Tensor, ""]:
    """Return tr((A B)^(1/2)) of A = a^T a and B = b^T b.

    It is the sum of the singular values of a b^T, because A B and (a b^T)(a b^T)^T have the same
    eigenvalues up to zeros. If there are more rows than columns, triangular factors replace a and
    b: they have the same squares and fewer rows.
    """
    if min(len(a), len(b)) > a.shape[1]:
        a, b = (torch.linalg.qr(z, mode="r").R for z in (a, b))
    return torch.linalg.matrix_norm(a @ b.T, ord="nuc")
