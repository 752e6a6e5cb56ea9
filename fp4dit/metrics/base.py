"""One value per image, in the order seen: means, intervals and paired tests are made from these later."""

from abc import abstractmethod
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Images = Float[Tensor, "n 3 h w"]


class PerImage(Metric):
    """Subclasses say how to `score` a batch."""

    full_state_update = False
    compares = False  # with the full-precision image, and so says nothing about that image itself
    values: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("values", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        """Images are in [0, 1]; the reference is the full-precision image of the same prompt and seed."""

    def update(self, images: Images, reference: Images, prompts: Sequence[str]) -> None:
        self.values.append(self.score(images, reference, prompts))

    def compute(self) -> Float[Tensor, " *n"]:
        """torchmetrics makes a scalar of the value of a single image."""
        return dim_zero_cat(self.values)
