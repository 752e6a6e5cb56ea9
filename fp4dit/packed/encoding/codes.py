"""Map the values of a number format to integer codes, and back."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from fp4dit.numerics.formats import Format
from fp4dit.numerics.shared_mantissa import SharedMantissa
from fp4dit.utils.errors import UserError

CodeValues = Float[Tensor, "codes"]


def list_code_values(fmt: Format) -> CodeValues:
    """Return the value of every code of a format, NaN for codes without a value.

    If the values are symmetric around zero, the highest bit of a code is the sign and the other
    bits are the rank of the magnitude, from 0 up. For ExMy formats these are the usual bits of
    sign, exponent and mantissa; the rule is the same for a symmetric INT. Codes of other formats
    are the rank of the value, from the least value up.

    Raises:
        UserError: if the format has more values than 8 bits can tell apart.
    """
    values, bits = fmt.values(), count_code_bits(fmt)
    if len(values) > 2**bits or bits > 8:
        raise UserError(
            f"{fmt.name} has {len(values)} values, and is not packed: choose a format of at most "
            "8 bits"
        )
    if values.equal(-values.flip(0)):
        magnitudes = pad_with_nan(values[values >= 0].abs(), 2 ** (bits - 1))
        return torch.cat([magnitudes, -magnitudes])
    return pad_with_nan(values, 2**bits)


def count_code_bits(fmt: Format) -> int:
    """Return the bits of a whole code.

    The values of a format with a shared mantissa bit are those of its base format.
    """
    base = fmt.base if isinstance(fmt, SharedMantissa) else fmt
    return int(base.bits)


def pad_with_nan(values: Float[Tensor, "v"], count: int) -> CodeValues:
    """Pad `values` with NaN to length `count`."""
    return torch.cat([values, values.new_full((count - len(values),), torch.nan)])


def build_byte_table(fmt: Format) -> Int64[Tensor, "256"]:
    """Return both values of every byte of two 4-bit codes, as the bits of one 64-bit integer.

    One look-up of a whole byte is six times faster than taking the byte apart.
    """
    values = list_code_values(fmt)
    value_pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)
    return value_pairs.view(torch.int64).flatten()


def encode_values(x: Float[Tensor, "*n"], code_values: CodeValues) -> UInt8[Tensor, "*n"]:
    """Return the code of each value. Minus zero keeps its sign if it has a code.

    Raises:
        ValueError: if a value has no code.
    """
    order = code_values.argsort(stable=True)  # NaN comes last
    ascending = code_values[order]
    numbers = ascending[~ascending.isnan()]
    rank = torch.searchsorted(numbers, x.contiguous()).clamp(max=len(ascending) - 1)
    if not ascending[rank].equal(x):
        raise ValueError("a value has no code")
    codes = order[rank].to(torch.uint8)
    zero_codes = (code_values == 0).nonzero().flatten()
    codes = codes.masked_fill((x == 0) & ~x.signbit(), int(zero_codes[0]))
    return codes.masked_fill((x == 0) & x.signbit(), int(zero_codes[-1]))
