"""A metric of videos: how much the changes from frame to frame differ from full precision's."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from fp4dit.metrics.base import PerImageMetric, Videos


class Flicker(PerImageMetric):
    """Root mean square of the difference of the changes from one frame to the next.

    With the frames x_1, ..., x_F of a video and r_1, ..., r_F of the full-precision video of the
    same seed, in [0, 1]::

        flicker = sqrt(mean(((x_{t+1} - x_t) - (r_{t+1} - r_t)) ** 2))

    The mean is over t = 1, ..., F - 1, channels and pixels. An error that is the same in each frame
    changes the picture and does not flicker: its value is 0. Independent errors with a root mean
    square of e have a value of e times the root of 2, and an error that changes its sign in each
    frame has a value of 2 e. Tables print it in levels of 255.

    Example:
        >>> Flicker().score(videos, videos + 0.1, prompts)  # 2 videos
        tensor([0., 0.])
    """

    title, digits, factor, higher_is_better = "Flicker, levels", 2, 255.0, False
    compares_to_reference = True
    reads_videos = True
    about = (
        "Root mean square of the difference to the full-precision video in the changes from frame "
        "to frame, in levels of 255"
    )

    def score(
        self, images: Videos, reference: Videos, prompts: Sequence[str]
    ) -> Float[Tensor, " n"]:
        errors = (images - reference).diff(dim=1)
        return errors.square().mean((1, 2, 3, 4)).sqrt()
