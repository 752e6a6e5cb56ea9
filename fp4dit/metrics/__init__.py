"""Image metrics. Each is a class that carries its title, its number of digits and its direction.

To add a metric: write a module with a subclass of `PerImageMetric` or `SetMetric` (`base.py`), and
a file in `conf/metrics` that names it; give it a tag in `fp4dit/registry.py`. Tables print it.
To list it there by a short path, as `fp4dit.metrics.PSNR`, export it below, in all three places
(`TYPE_CHECKING`, `__all__` and `export_lazily`), or list its full module path.
"""

from typing import TYPE_CHECKING

from fp4dit.utils.lazy import export_lazily

if TYPE_CHECKING:
    from fp4dit.metrics.base import FeatureExtractor, ImageMetric, PerImageMetric, SetMetric
    from fp4dit.metrics.clip import (
        CLIPFeatures,
        CLIPImageSimilarity,
        CLIPScore,
        CLIPScoreB32,
        CLIPScoreL14,
    )
    from fp4dit.metrics.full_reference import LPIPS, PSNR, SSIM
    from fp4dit.metrics.hps import HPSv20, HPSv21
    from fp4dit.metrics.image_reward import ImageReward
    from fp4dit.metrics.inception import InceptionFeatures
    from fp4dit.metrics.inception_metrics import FID, InceptionScore, SpatialFID
    from fp4dit.metrics.pairwise import CMMD, KID, Precision, Recall
    from fp4dit.metrics.pickscore import PickScore

__all__ = [
    "CMMD",
    "FID",
    "KID",
    "LPIPS",
    "PSNR",
    "SSIM",
    "CLIPFeatures",
    "CLIPImageSimilarity",
    "CLIPScore",
    "CLIPScoreB32",
    "CLIPScoreL14",
    "FeatureExtractor",
    "HPSv20",
    "HPSv21",
    "ImageMetric",
    "ImageReward",
    "InceptionFeatures",
    "InceptionScore",
    "PerImageMetric",
    "PickScore",
    "Precision",
    "Recall",
    "SetMetric",
    "SpatialFID",
]

# The libraries that these modules need take seconds to import, so each is imported when it is used.
__getattr__ = export_lazily(
    __name__,
    {
        "base": ["FeatureExtractor", "ImageMetric", "PerImageMetric", "SetMetric"],
        "clip": [
            "CLIPFeatures",
            "CLIPImageSimilarity",
            "CLIPScore",
            "CLIPScoreB32",
            "CLIPScoreL14",
        ],
        "full_reference": ["LPIPS", "PSNR", "SSIM"],
        "hps": ["HPSv20", "HPSv21"],
        "image_reward": ["ImageReward"],
        "inception": ["InceptionFeatures"],
        "inception_metrics": ["FID", "InceptionScore", "SpatialFID"],
        "pairwise": ["CMMD", "KID", "Precision", "Recall"],
        "pickscore": ["PickScore"],
    },
)
