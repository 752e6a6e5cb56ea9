"""Adapters of diffusion transformers.

The sources (`PixArt`, `Hunyuan`, `DiT` and `Generic`) say where a pipeline is, and load it. Their
adapters list the units of its transformer, such as its blocks, and draw images. A new adapter is
one module like `dit_xl.py`, one file in `conf/model/`, and one line in `fp4dit/registry.py`; see
docs/guides/your-model.md. `__init__.pyi` exports the names that configs use, such as
`fp4dit.models.DiT`.
"""

import lazy_loader

# The libraries of these modules take seconds to import. Each name of __init__.pyi is imported
# when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
