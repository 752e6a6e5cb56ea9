"""Dynamic quantization of tokens with one scale each, in few passes over memory."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import NumberFormat
from fp4dit.numerics.quantizer import PerRow
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.fake_quant import FakeQuantize

# Values that are quantized at a time on a CPU. In fp32, with intermediates, they fit the cache of
# one core.
TOKEN_CHUNK_VALUES = 2**17


def fast_token_format(fake_quant: nn.Module) -> NumberFormat | None:
    """Return the number format if `quantize_tokens` can replace a quantizer, else None.

    The quantizer must be dynamic, with one unrounded abs-max scale for each token, and its format
    signed, of at most 8 bits.
    """
    if not isinstance(fake_quant, FakeQuantize) or fake_quant.static:
        return None
    quantizer, fmt = fake_quant.quantizer, fake_quant.quantizer.format
    if not isinstance(quantizer.granularity, PerRow) or quantizer.scale != AbsMax():
        return None
    if not isinstance(fmt, NumberFormat):
        return None
    return fmt if fmt.min < 0 and fmt.bits <= 8 and fmt.max <= 2.0**64 else None


def quantize_tokens(x: Float[Tensor, "*b k"], fmt: NumberFormat) -> Float[Tensor, "*b k"]:
    """Fake-quantize each row of `x` with its abs-max scale.

    The result is bit-exact with `Quantizer`, except for the sign of zeros. On a CPU some rows are
    quantized at a time, so that they stay in the cache.
    """
    rows = x.reshape(-1, x.shape[-1])
    quantized = torch.empty_like(rows)
    chunk = max(1, TOKEN_CHUNK_VALUES // rows.shape[1]) if x.is_cpu else len(rows)
    for source, target in zip(rows.split(chunk), quantized.split(chunk), strict=True):
        target.copy_(quantize_token_chunk(source.float(), fmt))
    return quantized.view(x.shape)


def quantize_token_chunk(rows: Float[Tensor, "r k"], fmt: NumberFormat) -> Float[Tensor, "r k"]:
    """Fake-quantize rows of fp32.

    No quotient exceeds the largest value by more than a rounding error, so nothing is clipped.
    """
    scale = AbsMax()(rows, fmt).scale
    return fmt.nearest_(rows / scale).mul_(scale)
