"""The Triton program of a projection: rotate, scale, round, mask, all of a tile in registers.

`no_type_check` keeps the type checks of our tests from wrapping what Triton reads as it stands.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def magnitude(x):
    """As integers, whose order is that of the magnitudes, with NaN as the largest."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def power(exponent):
    """2^exponent, from -127 on, where it is subnormal."""
    bits = tl.where(exponent > -127, (exponent + 127) << 23, 1 << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def exponents(reach, OFFSET: tl.constexpr, THRESHOLD: tl.constexpr):
    """Of the scales: that of the reach plus OFFSET, one more where its mantissa in [1, 2) is not below THRESHOLD."""
    tiny = reach < 2.0**-126
    bits = tl.where(tiny, reach * 2.0**24, reach).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent = (bits >> 23) - tl.where(tiny, 151, 127) + OFFSET + (mantissa >= THRESHOLD).to(tl.int32)
    return tl.minimum(tl.maximum(exponent, -127), 127)


@triton.jit
@no_type_check
def reaches(tile, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Of each row: COUNT root mean squares, or if 0 the largest value."""
    reach = tl.max(magnitude(tile), 1).to(tl.float32, bitcast=True)
    if COUNT > 0:
        root = COUNT * tl.sqrt_rn(tl.sum(tile * tile, 1) / BLOCK)
        reach = tl.where(root == 0, reach, root)  # squares may be too small for fp32
    return reach


@triton.jit
@no_type_check
def binades(size, FLOOR: tl.constexpr):
    """The power of two below each magnitude, and FLOOR at least, where the subnormals end."""
    return tl.maximum((magnitude(size) & 0x7F800000).to(tl.float32, bitcast=True), FLOOR)


@triton.jit
@no_type_check
def nearest(size, MANTISSA: tl.constexpr, FLOOR: tl.constexpr):
    whole = binades(size, FLOOR) * (1.5 * 2.0 ** (23 - MANTISSA))  # numbers of its size lie one step apart
    return (size + whole) - whole


@triton.jit
@no_type_check
def at_random(size, draw, MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr):
    """Up as likely as they are near, by a `draw` in [0, 1)."""
    step = binades(size, FLOOR) * (2.0**-MANTISSA)
    inner = tl.floor(size / step) * step
    return tl.minimum(tl.where(draw * step < size - inner, inner + step, inner), LARGEST)


@triton.jit
@no_type_check
def index(level):
    """Of a magnitude among those of E2M1: 0, 1/2, 1, 3/2, 2, 3, 4, 6."""
    halves = (2 * level).to(tl.int32)
    return tl.where(halves > 4, tl.where(halves > 6, tl.where(halves > 8, 7, 6), 5), halves)


@triton.jit
@no_type_check
def projected(
    x, turn, seed, values, kept, codes, scales, m, k, stride_m, stride_k,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, THRESHOLD: tl.constexpr, COUNT: tl.constexpr,
    MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one block. COUNT root mean squares are its reach, or if 0 its largest value. With a `seed` it rounds
    stochastically; `kept`, and `codes` of E2M1 with their `scales`, are written if they are given."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block, place = tl.program_id(1), tl.arange(0, BLOCK)
    column = block * BLOCK + place
    inside = (row < m)[:, None]
    given = x + row[:, None] * stride_m + column[None, :].to(tl.int64) * stride_k
    tile = tl.load(given, mask=inside & (column < k)[None, :], other=0.0).to(tl.float32)
    rotation = tl.load(turn + place[:, None] * BLOCK + place[None, :])
    tile = tl.dot(tile, rotation, input_precision="ieee")

    reach = reaches(tile, COUNT, BLOCK)
    exponent = exponents(reach, OFFSET, THRESHOLD)
    scale = tl.where(reach == 0, 1.0, power(exponent))
    scale = tl.where(reach < float("inf"), scale, float("nan"))[:, None]

    if WIDEN != 1:
        tile = tl.math.div_rn(tile, WIDEN)
    grid = tl.math.div_rn(tile, scale)
    size = tl.minimum(tl.abs(grid), LARGEST)
    out = row[:, None] * WIDTH + column[None, :]
    if seed is None:
        level = nearest(size, MANTISSA, FLOOR)
    else:
        level = at_random(size, tl.rand(tl.load(seed), out.to(tl.int32)), MANTISSA, FLOOR, LARGEST)
    sign = grid.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)

    tl.store(values + out, (rounded * scale).to(values.dtype.element_ty), mask=inside)
    if kept is not None:
        tl.store(kept + out, (tl.abs(grid) < LARGEST).to(kept.dtype.element_ty), mask=inside)
    if codes is not None:
        low, high = tl.split((index(level) | ((sign >> 28) & 8)).reshape(ROWS, BLOCK // 2, 2))
        byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(codes + row[:, None] * (WIDTH // 2) + byte[None, :], (low | (high << 4)).to(tl.uint8), mask=inside)
        stored = tl.where(reach == 0, 127, tl.where(reach < float("inf"), exponent + 127, 255))
        tl.store(scales + row * (WIDTH // BLOCK) + block, stored.to(tl.uint8), mask=row < m)
