"""Adapters of diffusion transformers.

The sources (`PixArt`, `Hunyuan`, `DiT` and `Generic`) say where a pipeline is, and load it. Their
adapters list the units of its transformer, such as its blocks, and draw images. A new adapter is
one module like `dit_xl.py`, one file in `conf/model/`, and one line in `fp4dit/registry.py`; see
docs/your_model.md. To list it there by a short path, as `fp4dit.models.DiT`, export it below, in
all three places (`TYPE_CHECKING`, `__all__` and `export_lazily`), or list its full module path.
"""

from typing import TYPE_CHECKING

from fp4dit.utils.lazy import export_lazily

if TYPE_CHECKING:
    from fp4dit.models.adapter import TransformerAdapter
    from fp4dit.models.base import Pipeline, PipelineSource
    from fp4dit.models.blocks import Unit
    from fp4dit.models.dit_xl import DiT
    from fp4dit.models.generic import Generic
    from fp4dit.models.hunyuan import Hunyuan
    from fp4dit.models.pixart import PixArt, PixArtAdapter
    from fp4dit.models.pretrained import PretrainedSource

__all__ = [
    "DiT",
    "Generic",
    "Hunyuan",
    "Pipeline",
    "PipelineSource",
    "PixArt",
    "PixArtAdapter",
    "PretrainedSource",
    "TransformerAdapter",
    "Unit",
]

# The libraries that these modules need take seconds to import, so each is imported when it is used.
__getattr__ = export_lazily(
    __name__,
    {
        "adapter": ["TransformerAdapter"],
        "base": ["Pipeline", "PipelineSource"],
        "blocks": ["Unit"],
        "dit_xl": ["DiT"],
        "generic": ["Generic"],
        "hunyuan": ["Hunyuan"],
        "pixart": ["PixArt", "PixArtAdapter"],
        "pretrained": ["PretrainedSource"],
    },
)
