"""Low-bit floating-point quantization of diffusion transformers.

Once this is imported, diffusers and transformers load what it packs. They are told when they are imported themselves,
for that takes seconds.
"""

from typing import Any

import wrapt


@wrapt.when_imported("diffusers.models.modeling_utils")
def _tell_diffusers(_: Any) -> None:
    import fp4dit.packed.hub  # pyright: ignore[reportUnusedImport]  # noqa: F401


@wrapt.when_imported("transformers.modeling_utils")
def _tell_transformers(_: Any) -> None:
    import fp4dit.packed.text  # pyright: ignore[reportUnusedImport]  # noqa: F401
