"""Tokens quantized online, each with one scale, in few passes over memory."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.formats import NumberFormat
from fp4dit.grid import Grid
from fp4dit.scales import AbsMax

PART = 2**17  # values that are quantized at a time: in fp32, with what is made of them, what a cache of a core holds


def token_format(activation: nn.Module) -> NumberFormat | None:
    """The format, if this is all that the activation does, and `quantized` can do it."""
    if not isinstance(activation, Grid) or activation.static:
        return None
    given, fmt = activation.quantizer, activation.quantizer.format
    if given.granularity.unit != "row" or given.scale != AbsMax() or not isinstance(fmt, NumberFormat):
        return None
    return fmt if fmt.min < 0 and fmt.bits <= 8 and fmt.max <= 2.0**64 else None


def quantized(x: Float[Tensor, "*b k"], fmt: NumberFormat) -> Float[Tensor, "*b k"]:
    """What the activation's quantizer makes of `x`, to the bit but for the sign of zeros: on a CPU some rows at a time,
    before they leave the cache."""
    rows = x.reshape(-1, x.shape[-1])
    made = torch.empty_like(rows)
    parts = max(1, PART // rows.shape[1]) if x.is_cpu else len(rows)
    for given, own in zip(rows.split(parts), made.split(parts), strict=True):
        own.copy_(rounded(given.float(), fmt))
    return made.view(x.shape)


def rounded(rows: Float[Tensor, "r k"], fmt: NumberFormat) -> Float[Tensor, "r k"]:
    """Nothing exceeds the largest value by more than a rounding error, so that nothing need be clipped."""
    scale = AbsMax()(rows, fmt).scale
    return fmt.nearest_(rows / scale).mul_(scale)
