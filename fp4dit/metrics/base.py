"""What a metric says of images: a number of each, or one of the whole set. Intervals and tests come later."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fp4dit.statistics import Interval

Images = Float[Tensor, "n 3 h w"]
Features = Mapping[str, Float[Tensor, "n d"]]  # of each image, by the layer that they are the answer of


class PerImage(Metric):
    """One value per image, in the order seen. Subclasses say how to `score` a batch, and what they are: `about` names
    model, version, preprocessing and source."""

    full_state_update = False
    compares = False  # with the full-precision image, and so says nothing about that image itself
    about: str
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Images are in [0, 1]; the reference is the full-precision image of the same prompt and seed."""

    def note(self, prompts: Sequence[str]) -> str:
        """What a reader has to know of these prompts' scores, if anything."""
        return ""

    def update(self, images: Images, reference: Images, prompts: Sequence[str]) -> None:
        self.values.append(self.score(images, reference, prompts))

    def compute(self) -> Float[Tensor, " *n"]:
        """torchmetrics makes a scalar of the value of a single image."""
        return dim_zero_cat(self.values)


@runtime_checkable
class Extractor(Protocol):
    """Where features come from: light, and equal where its features are, so that metrics share one that is loaded.

    `name` is short and fit for a file: of the network and, behind a dash, of the filter that images are resized with.
    """

    @property
    def path(self) -> str:
        """Of its weights, as `fp4dit.weights` finds them."""
        ...

    @property
    def name(self) -> str: ...
    def load(self) -> nn.Module:
        """Answers images in [0, 1] with the Features of all its layers, in fp32."""
        ...


@runtime_checkable
class PerSet(Protocol):
    """A number of the whole set, made of the features that `layers` of the extractor give for its images, and for those
    of a reference: the full-precision ones if `compares`, else what the metric brings itself, or none."""

    extractor: Extractor
    layers: Sequence[str]
    compares: bool
    about: str

    def label(self, name: str, count: int) -> str:
        """The name under which the number is stored: `name`, reference and its count, the images' count, the filter."""
        ...

    def report(self, features: Features, reference: Features | None) -> Interval:
        """The number and its 95 % interval, by bootstrap over images."""
        ...
