"""The metric that reads an image and compares the reading with the prompt."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.base import Images, PerImageMetric
from fp4dit.worlds.base import World


class OracleAccuracy(PerImageMetric):
    """Share of images in which a world's oracle reads exactly what the caption says.

    Args:
        world: World whose captions the images were drawn for.

    Example:
        >>> OracleAccuracy(ShapesWorld()).score(images, images, captions)
    """

    title, digits, factor, higher_is_better = "Oracle, %", 0, 100.0, True

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        *parts, last, _ = world.verdicts
        self.about = (
            f"{', '.join(parts).capitalize()} and {last} as the oracle of the {world.name} world "
            "reads them"
        )

    def score(
        self, images: Images, reference: Images, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        verdicts = self.world.judge_images(images, prompts)
        return torch.tensor(verdicts["all"], dtype=torch.float32, device=images.device)
