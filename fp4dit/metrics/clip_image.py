"""How close an image is to the full-precision one, in the eyes of any open_clip model."""

from collections.abc import Sequence

import open_clip
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fp4dit.metrics.base import Images, PerImage
from fp4dit.metrics.towers import from_folder


class ClipImage(PerImage):
    """The cosine of the embeddings of both, in [-1, 1]. `path` and `quick_gelu` are those of a CLIP score."""

    higher_is_better = True
    compares = True

    def __init__(self, path: str, quick_gelu: bool = False) -> None:
        super().__init__()
        self.towers, told = from_folder(path, quick_gelu)
        version = open_clip.__version__
        self.about = f"Cosine to the full-precision image's embedding by {path} in open_clip {version}: {told}"

    def score(self, images: Images, reference: Images, prompts: Sequence[str]) -> Float[Tensor, " n"]:
        return F.cosine_similarity(self.towers.of_images(images), self.towers.of_images(reference))
