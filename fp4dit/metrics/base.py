"""Base classes of the metrics: one value per image, or one value for a whole set of images.

Intervals and tests of per-image values are computed later, by `fp4dit.utils.statistics`.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from fp4dit.utils.errors import UserError
from fp4dit.utils.statistics import Interval

Images = Float[Tensor, "n 3 h w"]
Videos = Float[Tensor, "n f 3 h w"]  # n videos of f frames
Features = Mapping[str, Float[Tensor, "n d"]]  # the output of each layer, one row per image


class ImageMetric(Metric):
    """Base of all metrics. Its class attributes are what a table needs to print the metric.

    Attributes:
        title: Heading of the column.
        digits: Number of decimals that are printed.
        factor: Printed value / stored value, such as 100 for a share that is printed in percent.
        higher_is_better: Whether a higher value is better; None if rows are not to be compared.
        compares_to_reference: Whether the value compares with the full-precision images of the
            same prompts and seeds. Such a metric is not computed for these images themselves.
        per_image: Whether there is a value for each image.
        about: Definition, model, version, preprocessing and source of the metric, in one line.

    Example:
        >>> PSNR.describe_column()["title"]
        'PSNR, dB'
    """

    full_state_update = False
    title: ClassVar[str] = ""
    digits: ClassVar[int] = 1
    factor: ClassVar[float] = 1.0
    compares_to_reference: bool = False
    per_image: ClassVar[bool]
    about: str

    @classmethod
    def describe_column(cls) -> dict[str, Any]:
        """Return the fields of the metric's column in a table (`fp4dit.tables.TableColumn`).

        Raises:
            UserError: if the class has no title, and so cannot be printed.
        """
        if not cls.title:
            raise UserError(
                f"the metric {cls.__name__} cannot be printed: give its class a `title`, `digits` "
                "and `higher_is_better`, as in fp4dit/metrics/base.py"
            )
        directions = {True: "higher", False: "lower", None: None}
        return {
            "title": cls.title,
            "digits": cls.digits,
            "factor": cls.factor,
            "better": directions[cls.higher_is_better],
            "compares_to_reference": cls.compares_to_reference,
            "per_image": cls.per_image,
            "per_set": not cls.per_image,
        }


class PerImageMetric(ImageMetric):
    """Metric with one value per image, in the order in which the images are passed.

    A new metric is a subclass, and a file conf/metrics/NAME.yaml that names it. The value of a
    video is the mean over its frames, unless the metric reads videos.

    Attributes:
        reads_videos: Whether `score` gets whole videos, as `Videos`, and no single images.

    Example:
        >>> class Brightness(PerImageMetric):
        ...     title, digits, higher_is_better = "Brightness", 3, True
        ...     about = "Mean over pixels and channels"
        ...
        ...     def score(self, images, reference, prompts):
        ...         return images.mean((1, 2, 3))
        >>> Brightness()(images, reference, prompts)
        tensor([0.5000, 0.5000])
    """

    per_image = True
    reads_videos: ClassVar[bool] = False
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        """Return one value per image.

        Args:
            images: Images in [0, 1].
            reference: Full-precision images of the same prompts and seeds, in [0, 1].
            prompts: Prompt of each image.
        """

    def describe_cut_prompts(self, prompts: Sequence[str]) -> str:
        """Return a remark on how many of these prompts the metric does not read whole, or ""."""
        return ""

    def update(self, images: Images, reference: Images, prompts: Sequence[str]) -> None:
        """Add the values of a batch."""
        self.values.append(self.score(images, reference, prompts))

    def compute(self) -> Float[Tensor, " *n"]:
        """Return all values. torchmetrics turns the value of a single image into a scalar."""
        return dim_zero_cat(self.values)


@runtime_checkable
class FeatureExtractor(Protocol):
    """Recipe of a network that computes features of images.

    It is hashable and cheap to make. Metrics whose extractors are equal share one loaded network.

    Example:
        >>> network = InceptionFeatures("/path/of/weights-inception-2015-12-05.pth").load()
        >>> network(images)["pool"].shape  # 8 images
        torch.Size([8, 2048])
    """

    @property
    def path(self) -> str:
        """Location of the weights, as `fp4dit.utils.hub` finds them."""
        ...

    @property
    def name(self) -> str:
        """Short name, valid in a file name: NETWORK-FILTER, where FILTER resizes the images."""
        ...

    def load(self) -> nn.Module:
        """Return the network: it maps images in [0, 1] to the `Features` of its layers, in fp32."""
        ...


class SetMetric(ImageMetric):
    """Metric with one value for a whole set of images, computed from features of the images.

    `fp4dit.metrics.set_metric.FeatureSetMetric` implements all but the formula.

    Attributes:
        extractor: Recipe of the network that computes the features.
        layers: Layers of the network that the metric reads.
        compares_to_reference: Whether the reference is the set of full-precision images.
            Otherwise the metric brings a reference of its own, or needs none.

    Example:
        >>> metric = Precision(InceptionFeatures("/path/of/weights-inception-2015-12-05.pth"))
        >>> metric.stored_name("precision", count=5000)
        'precision/full_precision-5000/tf1-bilinear'
    """

    per_image = False
    extractor: FeatureExtractor
    layers: Sequence[str]

    @abstractmethod
    def stored_name(self, name: str, count: int) -> str:
        """Return the name under which the value is stored.

        It contains what the value depends on besides the images: the metric's `name`, the
        reference and its size, the number of images (`count`), and the resizing filter.
        """

    @abstractmethod
    def estimate(self, features: Features, reference: Features | None) -> Interval:
        """Return the value and its 95 % interval, by a bootstrap over images."""
