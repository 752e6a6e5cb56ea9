"""Low-bit floating-point quantization of diffusion transformers.

    import fp4dit
    report = fp4dit.quantize(pipe, "nvfp4_4over6")
    pipe.save_pretrained("my-model-fp4")

Importing this package teaches diffusers and transformers to load packed checkpoints. The
integrations are registered when those libraries are imported, because importing them takes seconds.
The public functions are in `fp4dit.api`, and are imported when they are first used.
"""

import logging
from importlib.metadata import version
from typing import Any

import lazy_loader
import wrapt

__version__ = version("fp4dit")

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# While diffusers is imported, it warns that torchao 0.18 lacks classes of earlier versions. Nothing
# here needs them.
logging.getLogger("diffusers.quantizers.torchao.torchao_quantizer").addFilter(
    lambda record: "Unable to import `torchao`" not in record.getMessage()
)


@wrapt.when_imported("diffusers.models.modeling_utils")
def _register_with_diffusers(_: Any) -> None:
    import fp4dit.packed.integrations.diffusers  # pyright: ignore[reportUnusedImport]  # noqa: F401


@wrapt.when_imported("transformers.modeling_utils")
def _register_with_transformers(_: Any) -> None:
    import fp4dit.packed.integrations.transformers  # pyright: ignore[reportUnusedImport]  # noqa: F401
