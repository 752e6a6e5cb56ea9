"""CLIP score: how well an image and its prompt agree, in the eyes of any open_clip model."""

from collections.abc import Sequence

import open_clip
from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.towers import from_folder


class ClipScore(PerImage):
    """100 max(cos, 0), as torchmetrics defines it (arXiv:2104.08718 up to its factor).

    `path` is a folder in open_clip's layout, as `fp4dit.weights` finds it. OpenAI's weights were trained with
    `quick_gelu`, whether its config says so or not.
    """

    higher_is_better = True

    def __init__(self, path: str, quick_gelu: bool = False) -> None:
        super().__init__()
        self.towers, told = from_folder(path, quick_gelu)
        self.about = f"CLIP score, 100 max(cos, 0), of {path} in open_clip {open_clip.__version__}: {told}"

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return 100 * self.towers.agreement(images, prompts).clamp(min=0)

    def note(self, prompts: Sequence[str]) -> str:
        return self.towers.note(prompts)
