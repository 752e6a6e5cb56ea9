"""Trade memory for speed in a packed pipeline."""

from typing import Any

from torch import nn

from fp4dit.packed.nn.expanded_backend import expand_weights_
from fp4dit.utils.errors import UserError


def expand_weights(pipe: Any) -> int:
    """Expand the packed weights of a loaded pipeline to a byte each, in place.

    On a GPU, products then are those of cuBLAS in INT8 or FP8, instead of kernels that expand the
    codes for each product. Layers take about 12.4 bits for each weight instead of 4.1, because they
    keep their codes for products of at most 16 tokens, and for `save_pretrained`, which saves what
    it saved before. With one scale for each row it is one product, with groups one for each group.
    On GPUs before sm_80 this is the only way to use INT8. On a CPU it does nothing, unless fp4dit
    was installed without a C compiler.

    A layer is expanded if its activations are quantized dynamically with one scale for each token,
    to a format of few bits such as E2M3, INT8 or E4M3, and its weight has a scale for each row or
    for groups of at least 128.

    Args:
        pipe: A pipeline of diffusers, or a model.

    Returns:
        The number of layers that were expanded.

    Raises:
        UserError: If there is no such layer.

    Example:
        >>> pipe = PixArtSigmaPipeline.from_pretrained("my-model-fp4", device_map="cuda")
        >>> fp4dit.expand_weights(pipe)
        287
    """
    parts = [pipe] if isinstance(pipe, nn.Module) else pipe.components.values()
    count = sum(expand_weights_(part) for part in parts if isinstance(part, nn.Module))
    if not count:
        raise UserError(
            "no weight of this model can be expanded: a layer has to be packed (fp4dit.quantize) "
            "with one scale for each row or for groups of at least 128 weights, and its "
            "activations need a format such as e2m3, int8 or e4m3fn, and a dynamic scale for each "
            "token"
        )
    return count
