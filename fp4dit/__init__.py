"""Low-bit floating-point quantization of diffusion transformers.

Once this is imported, diffusers loads what it packs. It is told when it is imported itself, for that takes seconds.
"""

from typing import Any

import wrapt


@wrapt.when_imported("diffusers.models.modeling_utils")
def _register(_: Any) -> None:
    from fp4dit.packed.hub import register

    register()
