"""Expand the weights of a packed model once, and multiply by the vendor's libraries."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.qparams import Scale
from fp4dit.numerics.quantizer import PerGroup, PerRow
from fp4dit.packed.nn.base import PackedWeight, is_inference
from fp4dit.packed.nn.byte_numbers import quantize_to_bytes
from fp4dit.packed.nn.expanded_weight import ExpandedFp8, ExpandedInt8, ExpandedWeight
from fp4dit.packed.nn.limits import MAX_ROW_VALUES
from fp4dit.packed.nn.token_quant import fast_token_format

# Sums of int8 are exact, and as fast as those of E4M3.
KINDS: Sequence[type[ExpandedWeight]] = (ExpandedInt8, ExpandedFp8)

LEAST_GROUP = 128  # columns, below which a product for each group is slow


class ExpandedBackend:
    """Product of cuBLAS, or in INT8 of a CPU's library, with a weight that was expanded before.

    `expand_weights_` gives a layer such a weight beside its codes.

    Example:
        >>> ExpandedBackend().supports(packed_layer, torch.zeros(32, packed_layer.in_features))
        False
        >>> expand_layer_(packed_layer)
        True
        >>> ExpandedBackend().supports(packed_layer, torch.zeros(32, packed_layer.in_features))
        True
    """

    name, min_rows = "expanded", 0

    def supports(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> bool:
        weight = layer.expanded
        return weight is not None and is_inference(layer, x) and weight.supports(x)

    def __call__(self, layer: PackedWeight, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b o"]:
        weight, fmt = layer.expanded, fast_token_format(layer.input_fake_quant)
        assert weight is not None, "call `supports` first"
        assert fmt is not None, "the weight was expanded for another format of tokens"
        tokens, unit = quantize_to_bytes(x, fmt, weight.byte_numbers)
        y = weight.multiply(tokens, unit, layer.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])


def expand_weights_(model: nn.Module) -> int:
    """Expand the weights of all layers of a packed model that allow it, in place.

    Returns:
        The number of these layers.

    Example:
        >>> expand_weights_(pipe.transformer)
        287
    """
    layers = [layer for layer in model.modules() if isinstance(layer, PackedWeight)]
    return sum(map(expand_layer_, layers))


@torch.no_grad()
def expand_layer_(layer: PackedWeight) -> bool:
    """Expand the weight of a packed layer to int8 or E4M3 in place, if both formats allow it.

    The layer keeps its codes, for saving it and for products of few tokens.

    Returns:
        Whether it was expanded.
    """
    token_format = fast_token_format(layer.input_fake_quant)
    fmt = find_expandable_format(layer)
    if token_format is None or fmt is None:
        return False
    for kind in KINDS:
        if kind.byte_numbers.hold(token_format) and kind.byte_numbers.hold(fmt):
            qparams = layer.qparams
            assert isinstance(qparams, Scale)
            scale = qparams.scale.view(layer.out_features, -1)
            layer.expanded = kind(layer.decode_values(), fmt, scale)
            return True
    return False


def find_expandable_format(layer: PackedWeight) -> NumberFormat | None:
    """Return the format of a weight that libraries can multiply by; None if they cannot.

    They need one signed format, a scale for each row or for wide groups of a row, and dimensions
    that are multiples of 16.
    """
    fmt, granularity = layer.layout.formats[0], layer.layout.granularity
    if not isinstance(fmt, NumberFormat) or fmt.min == 0 or len(layer.layout.formats) > 1:
        return None
    if not isinstance(granularity, PerRow | PerGroup) or set(layer.layout.encodings) != {"scale"}:
        return None
    k = layer.in_features
    width = granularity.width(torch.Size([layer.out_features, k]))
    if k > MAX_ROW_VALUES or width % 16 or layer.out_features % 16:
        return None
    return fmt if width >= min(k, LEAST_GROUP) else None
