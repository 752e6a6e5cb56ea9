"""Which value each code of a number format stands for."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from fp4dit.errors import UserError
from fp4dit.formats import Format

Levels = Float[Tensor, "codes"]


def levels(fmt: Format) -> Levels:
    """The value of every code of up to 8 bits, NaN where a code stands for none.

    Of a format that lies evenly around zero the highest bit is the sign, and the others count magnitudes from 0 up: for
    ExMy these are the usual bits of sign, exponent and mantissa, and an INT differs in nothing. Other formats count
    their values from the least up.

    Raises:
        UserError: if the format has more values than 8 bits tell apart.
    """
    values, bits = fmt.values(), code_bits(fmt)
    if len(values) > 2**bits or bits > 8:
        raise UserError(f"{fmt.name} has {len(values)} values, and is not packed: choose a format of at most 8 bits")
    if values.equal(-values.flip(0)):
        magnitudes = filled(values[values >= 0].abs(), 2 ** (bits - 1))
        return torch.cat([magnitudes, -magnitudes])
    return filled(values, 2**bits)


def code_bits(fmt: Format) -> int:
    """Of one whole code. A format whose values share bits is as its values are."""
    return int(getattr(fmt, "base", fmt).bits)


def filled(values: Float[Tensor, "v"], count: int) -> Levels:
    return torch.cat([values, values.new_full((count - len(values),), torch.nan)])


def pairs(fmt: Format) -> Int64[Tensor, "256"]:
    """For every byte of two codes of 4 bits both values, as the bits of one number: a byte is looked up once, which is
    six times faster than taking it apart."""
    values = levels(fmt)
    both = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1)
    return both.view(torch.int64).flatten()


def encode(x: Float[Tensor, "*n"], levels: Levels) -> UInt8[Tensor, "*n"]:
    """The code of each value; -0 keeps its sign where there is a code for it.

    Raises:
        ValueError: if a value has no code.
    """
    order = levels.argsort(stable=True)  # NaN comes last
    ladder = levels[order]
    place = torch.searchsorted(ladder[ladder == ladder], x.contiguous()).clamp(max=len(ladder) - 1)
    if not ladder[place].equal(x):
        raise ValueError("a value has no code")
    codes = order[place].to(torch.uint8)
    zeros = (levels == 0).nonzero().flatten()
    return codes.masked_fill((x == 0) & ~x.signbit(), int(zeros[0])).masked_fill((x == 0) & x.signbit(), int(zeros[-1]))
