"""Peak signal-to-noise ratio against the full-precision image."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from fp4dit.metrics.base import Images, PerImage


class Psnr(PerImage):
    """In dB; infinite for equal images."""

    about = "Peak signal-to-noise ratio against the full-precision image of the same seed"
    higher_is_better = True
    compares = True

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return peak_signal_noise_ratio(images, reference, data_range=1.0, reduction="none", dim=(1, 2, 3))
