"""What is known of files of images and videos without torchvision, which an extra installs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fp4dit.utils.errors import UserError

FRAME_MILLISECONDS = 125


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image or a video with Pillow.

    Raises:
        UserError: if the file is not an image, as soon as that is found out.
    """
    try:
        with Image.open(path) as image:
            yield image
    # Pillow raises SyntaxError for a broken PNG.
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path} is no image ({error}): delete it and run again, and it will be drawn again"
        ) from error


def count_frames(path: Path) -> int:
    """Return the number of frames of a video, from the head of its file; 1 for an image.

    Raises:
        UserError: if the file is not an image.
    """
    with open_image(path) as image:
        return getattr(image, "n_frames", 1)
