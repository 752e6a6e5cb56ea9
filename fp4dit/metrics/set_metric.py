"""Metrics of a set of images on its features: reference, interval, and stored name."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from fp4dit.metrics.base import FeatureExtractor, Features, SetMetric
from fp4dit.metrics.real_features import RealFeatures
from fp4dit.utils.errors import UserError
from fp4dit.utils.statistics import Interval

FeatureMatrix = Float[Tensor, "_ d"]  # one row per image

Indices = Int[Tensor, " _"]

PairMatrix = Float[Tensor, "_ _"]


class FeatureSetMetric(SetMetric):
    """Metric that is a function of the features of all images and of a reference, in fp64.

    The reference is the set of full-precision images of the same prompts and seeds or, if
    `reference_path` names a file of features, a set of real images.

    The interval is the value ± 1.96 standard deviations over bootstrap resamples of the images.
    Full-precision images are resampled together with the images, real ones are not. Quantiles of
    the bootstrap would not be an interval: an image that is drawn twice makes a set less diverse,
    which makes most of these metrics worse.

    Args:
        extractor: Recipe of the network that computes the features.
        reference_path: File of `fp4dit.metrics.real_features`; None is the full-precision images.
        resamples: Number of bootstrap resamples.

    Example:
        >>> class MeanDistance(FeatureSetMetric):
        ...     title, digits, higher_is_better = "Mean distance", 3, False
        ...     layer, definition = "pool", "Distance of the mean features"
        ...
        ...     def compute_value(self, images, reference):
        ...         return (images.mean(0) - reference.mean(0)).norm().item()
    """

    layer: str
    min_images: int = 2
    definition: str

    def __init__(
        self, extractor: FeatureExtractor, reference_path: str | None = None, resamples: int = 100
    ) -> None:
        super().__init__()
        self.extractor, self.resamples = extractor, resamples
        self.real = RealFeatures(reference_path) if reference_path else None
        self.compares_to_reference, self.layers = self.real is None, (self.layer,)
        self.about = f"{self.definition}, features of {extractor.name}"
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("others", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def compute_value(self, images: FeatureMatrix, reference: FeatureMatrix) -> float:
        """Return the value of a set of images and its reference."""

    def update(self, images: FeatureMatrix, reference: FeatureMatrix) -> None:
        """Add the features of a batch."""
        self.images.append(images)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.others.append(reference)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def compute(self) -> Tensor:
        """Return the value of all batches."""
        images = dim_zero_cat(self.images).double()  # pyright: ignore[reportArgumentType]
        others = dim_zero_cat(self.others).double()  # pyright: ignore[reportArgumentType]
        return torch.tensor(self.compute_value(images, others))

    def stored_name(self, name: str, count: int) -> str:
        resizing_filter = self.extractor.name.partition("-")[2]
        return f"{name}/{self.describe_reference(count)}/{resizing_filter}"

    def describe_reference(self, count: int) -> str:
        """Return the reference and its size, and the number of images if it is another one."""
        if self.real is None:
            return f"full_precision-{count}"
        info = self.real.info
        return f"{info.name}-{info.count}" + (f"/{count}" if info.count != count else "")

    def estimate(self, features: Features, reference: Features | None) -> Interval:
        """Return the value and its 95 % interval.

        Raises:
            UserError: if there are too few images.
        """
        images = features[self.layer].double()
        if len(images) < self.min_images:
            raise UserError(
                f"{self.definition} needs at least {self.min_images} images, and there are "
                f"{len(images)}"
            )
        others = self.reference_features(images, reference)
        value, resample = self.compute_value(images, others), self.make_resampler(images, others)
        values = [resample(i) for i in self.draw_bootstrap_indices(len(images))]
        half_width = 1.96 * torch.tensor(values).std().item()
        return Interval(value, value - half_width, value + half_width)

    def make_resampler(
        self, images: FeatureMatrix, reference: FeatureMatrix
    ) -> Callable[[Indices], float]:
        """Return a function that computes the value of some of the images, given their indices."""

        def resample(i: Indices) -> float:
            return self.compute_value(
                images[i], reference[i] if self.compares_to_reference else reference
            )

        return resample

    def reference_features(
        self, images: FeatureMatrix, reference: Features | None
    ) -> FeatureMatrix:
        """Return the features of the reference in fp64, on the device of `images`."""
        if self.real is not None:
            return self.real.load_features(self.extractor)[self.layer].to(images)
        assert reference is not None, "full-precision images are the reference"
        return reference[self.layer].double()

    def draw_bootstrap_indices(self, count: int) -> list[Indices]:
        """Return the indices of each resample. The generator is on the CPU, on every device."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(count, (count,), generator=generator) for _ in range(self.resamples)]


class PairwiseMetric(FeatureSetMetric):
    """Metric of all pairs of images, within each set and between the two.

    The pairs are compared once, and the bootstrap draws from the result.

    Example:
        >>> class MeanDistance(PairwiseMetric):
        ...     title, digits, higher_is_better = "Mean distance", 3, False
        ...     layer, definition = "pool", "Mean distance of an image and a reference image"
        ...
        ...     def compare_pairs(self, x, y):
        ...         return torch.cdist(x, y)
        ...
        ...     def combine_pairs(self, images, reference, between):
        ...         return between.mean().item()
    """

    @abstractmethod
    def compare_pairs(self, x: FeatureMatrix, y: FeatureMatrix) -> PairMatrix:
        """Return a number for each pair of a row of x and a row of y."""

    @abstractmethod
    def combine_pairs(
        self, images: PairMatrix, reference: PairMatrix, between: PairMatrix
    ) -> float:
        """Return the value from the pairs within both sets and between them."""

    def compute_value(self, images: FeatureMatrix, reference: FeatureMatrix) -> float:
        return self.combine_pairs(*self.compare_sets(images, reference))

    def compare_sets(
        self, images: FeatureMatrix, reference: FeatureMatrix
    ) -> tuple[PairMatrix, PairMatrix, PairMatrix]:
        """Return the pairs within the images, within the reference, and between them."""
        return (
            self.compare_pairs(images, images),
            self.compare_pairs(reference, reference),
            self.compare_pairs(images, reference),
        )

    def make_resampler(
        self, images: FeatureMatrix, reference: FeatureMatrix
    ) -> Callable[[Indices], float]:
        within_images, within_reference, between = self.compare_sets(images, reference)

        def resample(i: Indices) -> float:
            j = i if self.compares_to_reference else slice(None)
            return self.combine_pairs(
                within_images[i][:, i], within_reference[j][:, j], between[i][:, j]
            )

        return resample
