"""Low-bit floating-point quantization of diffusion transformers.

Importing this package teaches diffusers and transformers to load packed checkpoints. The
integrations are registered when those libraries are imported, because importing them takes seconds.
"""

from typing import Any

import wrapt


@wrapt.when_imported("diffusers.models.modeling_utils")
def _register_with_diffusers(_: Any) -> None:
    import fp4dit.packed.integrations.diffusers  # pyright: ignore[reportUnusedImport]  # noqa: F401


@wrapt.when_imported("transformers.modeling_utils")
def _register_with_transformers(_: Any) -> None:
    import fp4dit.packed.integrations.transformers  # pyright: ignore[reportUnusedImport]  # noqa: F401
