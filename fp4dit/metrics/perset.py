"""What numbers of a whole set of images have in common: a reference, an interval, a name that says what they are."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fp4dit.errors import UserError
from fp4dit.metrics.base import Extractor, Features
from fp4dit.metrics.reference import RealSet
from fp4dit.statistics import Interval

Set = Float[Tensor, "_ d"]  # of as many images as there are
Index = Int[Tensor, " _"]
Pairs = Float[Tensor, "_ _"]


class SetMetric(Metric):
    """A number that `value` makes of the features in `layer` of all images and of their reference, in fp64.

    The reference are the full-precision images of the same prompts and seeds or, where `reference_path` names their
    file, a set of real ones. The interval is the number ± 1.96 standard deviations over `resamples` bootstraps: images
    are drawn anew, together with their full-precision ones, while real ones stay. The bootstrap's quantiles would be no
    interval, for an image drawn twice makes a set less diverse, and most of these numbers worse.
    """

    full_state_update = False
    layer: str
    least = 2  # images
    title: str

    def __init__(self, extractor: Extractor, reference_path: str | None = None, resamples: int = 100) -> None:
        super().__init__()
        self.extractor, self.resamples = extractor, resamples
        self.real = RealSet(reference_path) if reference_path else None
        self.compares, self.layers = self.real is None, (self.layer,)
        self.about = f"{self.title}, features of {extractor.name}"
        self.add_state("images", default=[], dist_reduce_fx="cat")
        self.add_state("others", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def value(self, images: Set, reference: Set) -> float: ...

    def update(self, images: Set, reference: Set) -> None:
        self.images.append(images)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        self.others.append(reference)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]

    def compute(self) -> Tensor:
        images, others = (dim_zero_cat(found).double() for found in (self.images, self.others))  # pyright: ignore
        return torch.tensor(self.value(images, others))

    def label(self, name: str, count: int) -> str:
        return f"{name}/{self.against(count)}/{self.extractor.name.partition('-')[2]}"

    def against(self, count: int) -> str:
        if self.real is None:
            return f"full_precision-{count}"
        known = self.real.known
        return f"{known.name}-{known.count}" + (f"/{count}" if known.count != count else "")

    def report(self, features: Features, reference: Features | None) -> Interval:
        """Raises UserError if there are too few images."""
        images = features[self.layer].double()
        if len(images) < self.least:
            raise UserError(f"{self.title} needs at least {self.least} images, and there are {len(images)}")
        others = self.other(images, reference)
        mean, drawn = self.value(images, others), self.drawn(images, others)
        spread = 1.96 * torch.tensor([drawn(i) for i in self.indices(len(images))]).std().item()
        return Interval(mean, mean - spread, mean + spread)

    def drawn(self, images: Set, reference: Set) -> Callable[[Index], float]:
        """The number of some of the images."""
        return lambda i: self.value(images[i], reference[i] if self.compares else reference)

    def other(self, images: Set, reference: Features | None) -> Set:
        if self.real is not None:
            return self.real.features(self.extractor)[self.layer].to(images)
        assert reference is not None, "full-precision images are the reference"
        return reference[self.layer].double()

    def indices(self, count: int) -> list[Index]:
        random = torch.Generator().manual_seed(0)  # of the CPU, for the same draws everywhere
        return [torch.randint(count, (count,), generator=random) for _ in range(self.resamples)]


class Pairwise(SetMetric):
    """A number of all pairs of images, within each set and between both: compared once, and then drawn from."""

    @abstractmethod
    def pairs(self, x: Set, y: Set) -> Pairs: ...
    @abstractmethod
    def number(self, images: Pairs, reference: Pairs, between: Pairs) -> float: ...

    def value(self, images: Set, reference: Set) -> float:
        return self.number(*self.all(images, reference))

    def all(self, images: Set, reference: Set) -> tuple[Pairs, Pairs, Pairs]:
        return self.pairs(images, images), self.pairs(reference, reference), self.pairs(images, reference)

    def drawn(self, images: Set, reference: Set) -> Callable[[Index], float]:
        own, theirs, between = self.all(images, reference)

        def some(i: Index) -> float:
            j = i if self.compares else slice(None)
            return self.number(own[i][:, i], theirs[j][:, j], between[i][:, j])

        return some
