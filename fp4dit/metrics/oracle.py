"""Does an image of the shapes world show what its prompt says?"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.base import Images, PerImage
from fp4dit.models.shapes.oracle import judge


class OracleAccuracy(PerImage):
    """1 when shapes, colours and relation are all right, else 0. Only for the shapes world's captions."""

    about = "Shapes, colours and relation as the oracle of the shapes world reads them"
    higher_is_better = True

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return torch.tensor(judge(images, prompts)["all"], dtype=torch.float32, device=images.device)
