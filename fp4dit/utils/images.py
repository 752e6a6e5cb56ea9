"""Read images and videos from files, and write them.

A video is an animated PNG, which is lossless, and which browsers play where they show images.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torchvision.transforms.functional import to_pil_image, to_tensor

from fp4dit.utils.image_files import FRAME_MILLISECONDS, open_image


def read_image(path: Path) -> Float[Tensor, "*f 3 h w"]:
    """Load an image, or the frames of a video, as RGB in [0, 1].

    Raises:
        UserError: if the file is not an image.
    """
    with open_image(path) as image:
        frames = []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(to_tensor(image.convert("RGB")))
    return frames[0] if len(frames) == 1 else torch.stack(frames)


def save_image(image: Float[Tensor, "*f 3 h w"], path: Path) -> None:
    """Write an image, or the frames of a video, as PNG.

    Args:
        image: Values, of which those outside [0, 1] are clamped.
        path: The file.
    """
    first, *others = [
        to_pil_image(frame) for frame in image.cpu().clamp(0, 1).reshape(-1, *image.shape[-3:])
    ]
    if others:
        first.save(
            path,
            format="PNG",
            save_all=True,
            append_images=others,
            duration=FRAME_MILLISECONDS,
            # Pillow joins equal frames unless they are blended in another way, and opaque frames
            # look the same in either way.
            blend=[number % 2 for number in range(len(others) + 1)],
        )
    else:
        first.save(path, format="PNG")
