"""Structural similarity to the full-precision image."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from fp4dit.metrics.base import Images, PerImage


class Ssim(PerImage):
    """In [-1, 1], Gaussian window of 11 pixels (Wang et al., 2004). Borders are mirrored, and count."""

    about = "Structural similarity (Wang et al., 2004) to the full-precision image of the same seed"
    higher_is_better = True
    compares = True

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        values = structural_similarity_index_measure(images, reference, data_range=1.0, reduction="none")
        assert isinstance(values, Tensor)
        return torch.atleast_1d(values)
