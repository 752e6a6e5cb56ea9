"""Projections on a GPU: rotation, scales, rounding and mask in one pass over the operand."""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton

from fp4dit.blockscales import E8M0, Exponent, largest
from fp4dit.formats import NumberFormat
from fp4dit.quantizer import Granularity
from fp4dit.scales import RootMeanSquares
from fp4dit.training import programs
from fp4dit.training.draws import Signs
from fp4dit.training.projections import BLOCK, E2M1, Gain, Matrix, Packed, Projected, Projection, Rounded, turn

ROWS = 64  # of one program: with 32 columns what four warps hold in registers


@dataclass(frozen=True)
class Settings:
    """What the program is to know of a projection. See `programs.exponents`."""

    way: Rounded
    format: NumberFormat
    offset: int
    threshold: float
    count: float


@lru_cache
def settings(way: Projection) -> Settings | None:
    """None if the program cannot do it."""
    if not isinstance(way, Rounded) or way.amax is not None or way.quantizer.granularity != Granularity("group", BLOCK):
        return None
    fmt, rule = way.quantizer.format, way.quantizer.scale
    if not isinstance(fmt, NumberFormat) or fmt.bits > 8 or fmt.min != -fmt.max:  # bf16 holds up to 8 bits
        return None
    if not isinstance(rule, E8M0) or rule.factor != 1 or tuple(rule.shifts) != (0,):
        return None
    if rule.reach is not largest and not isinstance(rule.reach, RootMeanSquares):
        return None
    count = rule.reach.count if isinstance(rule.reach, RootMeanSquares) else 0.0
    return Settings(way, fmt, *steps(rule.rule, fmt), float(count))


def steps(rule: Exponent, fmt: NumberFormat) -> tuple[int, float]:
    """A rule's exponent for a reach of 1, and from which number in (1, 2] on it is one more.

    It goes up by 1 per binade, once, and for a doubled reach it is 1 more: so it is found by asking.
    """
    ask = lambda reach: int(rule(torch.tensor([[reach]]), fmt))
    first, low, high = ask(1.0), 0, 1 << 23
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ask(1 + middle / (1 << 23)) == first else (low, middle)
    return first, 1 + high / (1 << 23)


def project(
    x: Matrix,
    known: Settings,
    signs: Signs | None = None,
    gain: Gain = 1.0,
    generator: torch.Generator | None = None,
    packed: bool = False,
) -> Projected:
    """The projection whose settings are `known`, of what is `turned`. The operand may lie in memory as it likes: a
    transposed one is read as it is. `packed`, for E2M1, has it also as codes and scales."""
    (m, k), way, fmt = x.shape, known.way, known.format
    width = k + -k % BLOCK
    new = lambda columns, dtype: torch.empty(m, columns, dtype=dtype, device=x.device)
    values, kept = new(width, torch.bfloat16), new(width, torch.bool) if way.masked else None
    assert not packed or fmt == E2M1, "only E2M1 has these codes"
    made = Packed(new(width // 2, torch.uint8), new(width // BLOCK, torch.uint8)) if packed else None
    seed = torch.randint(2**31 - 1, (1,), generator=generator, device=x.device) if way.stochastic else None
    codes, scales = made or (None, None)
    turning = turn(x.device, torch.float32, signs, gain).contiguous()
    with torch.cuda.device_of(x):
        programs.projected[triton.cdiv(m, ROWS), width // BLOCK](
            x, turning, seed, values, kept, codes, scales, m, k, x.stride(0), x.stride(1),
            width, known.offset, known.threshold, known.count,
            fmt.mantissa, 2.0**fmt.min_exponent, fmt.max, float(way.widen), ROWS, BLOCK,
        )  # fmt: skip
    return Projected(values, way.align * way.widen, kept, made)
