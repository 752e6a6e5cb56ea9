"""Set metrics of all pairs of images: precision and recall, KID and CMMD.

Precision and recall (arXiv:1904.06991) measure fidelity and diversity. KID (arXiv:1801.01401) and
CMMD (arXiv:2401.09603) estimate a squared maximum mean discrepancy,
MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y), with kernels k of their own.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.set_metric import FeatureMatrix, PairMatrix, PairwiseMetric

NUM_NEIGHBORS = 3


class Precision(PairwiseMetric):
    """Share of images that lie within the radius of a reference image.

    The radius of an image is its distance to its 3rd nearest neighbor in its own set.

    Example:
        >>> Precision(extractor).estimate({"pool": features}, {"pool": reference_features}).mean
        0.73
    """

    title, digits, higher_is_better = "Precision", 3, True
    layer = "pool"
    min_images = NUM_NEIGHBORS + 1
    definition = (
        f"Precision, {NUM_NEIGHBORS} neighbours, pool_3 of Inception-v3 (2015), arXiv:1904.06991"
    )

    def compare_pairs(self, x: FeatureMatrix, y: FeatureMatrix) -> PairMatrix:
        return torch.cdist(x, y)

    def combine_pairs(
        self, images: PairMatrix, reference: PairMatrix, between: PairMatrix
    ) -> float:
        return compute_share_within_radius(between, reference)


class Recall(Precision):
    """Share of reference images that lie within the radius of an image.

    Example:
        >>> Recall(extractor).compute_value(features, features)  # of a set and itself
        1.0
    """

    title = "Recall"
    definition = Precision.definition.replace("Precision", "Recall")

    def combine_pairs(
        self, images: PairMatrix, reference: PairMatrix, between: PairMatrix
    ) -> float:
        return compute_share_within_radius(between.T, images)


class KID(PairwiseMetric):
    """Unbiased estimate of the squared MMD under the kernel (x y / d + 1)^3 (arXiv:1801.01401).

    It uses all pairs of images, where the paper uses random subsets of 1,000. It can be negative.

    Example:
        >>> KID(extractor).estimate({"pool": features}, {"pool": reference_features}).mean
        0.0021
    """

    title, digits, factor, higher_is_better = "KID x 1000", 2, 1000.0, False
    layer = "pool"
    definition = "KID from all pairs, pool_3 of Inception-v3 (2015), arXiv:1801.01401"

    def compare_pairs(self, x: FeatureMatrix, y: FeatureMatrix) -> PairMatrix:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def combine_pairs(
        self, images: PairMatrix, reference: PairMatrix, between: PairMatrix
    ) -> float:
        within = mean_off_diagonal(images) + mean_off_diagonal(reference)
        return (within - 2 * between.mean()).item()


class CMMD(PairwiseMetric):
    """1000 times the squared MMD of CLIP's embeddings under a Gaussian kernel of width 10.

    The estimate is the authors' (arXiv:2401.09603), which is 0 for equal sets.

    Example:
        >>> CMMD(CLIPFeatures("/path/of/a/clip")).estimate(features, reference_features).mean
        0.518
    """

    title, digits, higher_is_better = "CMMD", 3, False
    layer = "embedding"
    definition = "CMMD, 1000 x squared distance, Gaussian kernel of width 10, arXiv:2401.09603"

    def compare_pairs(self, x: FeatureMatrix, y: FeatureMatrix) -> PairMatrix:
        return torch.exp(-(torch.cdist(x, y) ** 2) / (2 * 10**2))

    def combine_pairs(
        self, images: PairMatrix, reference: PairMatrix, between: PairMatrix
    ) -> float:
        return 1000 * (images.mean() + reference.mean() - 2 * between.mean()).item()


def compute_share_within_radius(distances: PairMatrix, within: PairMatrix) -> float:
    """Return the share of points that lie within the radius of at least one center.

    Args:
        distances: Distance of each point (row) to each center (column).
        within: Distances of the centers to one another, which define their radii.
    """
    radii = within.kthvalue(NUM_NEIGHBORS + 1, 1).values  # the nearest one is the center itself
    return (distances <= radii).any(1).double().mean().item()


def mean_off_diagonal(kernel: Float[Tensor, "n n"]) -> Float[Tensor, ""]:
    """Return the mean over pairs of two different images."""
    n = len(kernel)
    return (kernel.sum() - kernel.trace()) / (n * (n - 1))
