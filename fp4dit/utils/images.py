"""Read images from files."""

from pathlib import Path

from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from fp4dit.utils.errors import UserError


def read_image(path: Path) -> Float[Tensor, "3 h w"]:
    """Load an image as RGB in [0, 1].

    Raises:
        UserError: if the file is not an image.
    """
    try:
        with Image.open(path) as image:
            return to_tensor(image.convert("RGB"))
    # Pillow raises SyntaxError for a broken PNG.
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path} is no image ({error}): delete it and run again, and it will be drawn again"
        ) from error
