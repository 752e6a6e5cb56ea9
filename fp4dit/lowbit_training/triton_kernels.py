"""The Triton kernel that quantizes an operand: rotate, scale, round and mask a tile in registers.

`no_type_check` keeps the type checks of the tests from wrapping functions that Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def magnitude_bits(x):
    """Return magnitudes as integers of the same order, with NaN as the largest."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
@no_type_check
def power_of_two(exponent):
    """Return 2^exponent for exponents of at least -127, where it is subnormal."""
    bits = tl.where(exponent > -127, (exponent + 127) << 23, 1 << 22)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
@no_type_check
def scale_exponent(reach, OFFSET: tl.constexpr, THRESHOLD: tl.constexpr):
    """Return the exponent of the scale: that of the reach plus OFFSET.

    It is one more where the mantissa of the reach in [1, 2) is not below THRESHOLD.
    """
    tiny = reach < 2.0**-126
    bits = tl.where(tiny, reach * 2.0**24, reach).to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent = (
        (bits >> 23) - tl.where(tiny, 151, 127) + OFFSET + (mantissa >= THRESHOLD).to(tl.int32)
    )
    return tl.minimum(tl.maximum(exponent, -127), 127)


@triton.jit
@no_type_check
def block_reach(tile, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return COUNT root mean squares of each row, or its largest magnitude if COUNT is 0."""
    reach = tl.max(magnitude_bits(tile), 1).to(tl.float32, bitcast=True)
    if COUNT > 0:
        root = COUNT * tl.sqrt_rn(tl.sum(tile * tile, 1) / BLOCK)
        reach = tl.where(root == 0, reach, root)  # Squares can underflow.
    return reach


@triton.jit
@no_type_check
def floor_to_power_of_two(size, FLOOR: tl.constexpr):
    """Return the power of two at or below each magnitude, and at least FLOOR.

    FLOOR is the smallest normal number of the format.
    """
    return tl.maximum((magnitude_bits(size) & 0x7F800000).to(tl.float32, bitcast=True), FLOOR)


@triton.jit
@no_type_check
def round_magnitude_to_nearest(size, MANTISSA: tl.constexpr, FLOOR: tl.constexpr):
    """Return magnitudes rounded to nearest, ties to even.

    fp32 numbers of the size of `shift` lie one step of the format apart.
    """
    shift = floor_to_power_of_two(size, FLOOR) * (1.5 * 2.0 ** (23 - MANTISSA))
    return (size + shift) - shift


@triton.jit
@no_type_check
def round_magnitude_stochastically(
    size, draw, MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr
):
    """Return magnitudes rounded at random without bias, by uniform numbers in [0, 1)."""
    step = floor_to_power_of_two(size, FLOOR) * (2.0**-MANTISSA)
    inner = tl.floor(size / step) * step
    return tl.minimum(tl.where(draw * step < size - inner, inner + step, inner), LARGEST)


@triton.jit
@no_type_check
def encode_e2m1(level):
    """Return the index of a magnitude among those of E2M1: 0, 1/2, 1, 3/2, 2, 3, 4, 6."""
    halves = (2 * level).to(tl.int32)
    return tl.where(halves > 4, tl.where(halves > 6, tl.where(halves > 8, 7, 6), 5), halves)


@triton.jit
@no_type_check
def quantize_operand_kernel(
    x, rotation, seed, values, unclipped, codes, scales, m, k, stride_m, stride_k,
    WIDTH: tl.constexpr, OFFSET: tl.constexpr, THRESHOLD: tl.constexpr, COUNT: tl.constexpr,
    MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr, WIDEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize ROWS rows of one block of an operand.

    The reach of a row is COUNT root mean squares, or its largest magnitude if COUNT is 0. With a
    `seed` it rounds stochastically. It writes the mask `unclipped`, and the E2M1 `codes` with
    their `scales`, where these are given.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block, place = tl.program_id(1), tl.arange(0, BLOCK)
    column = block * BLOCK + place
    inside = (row < m)[:, None]
    pointers = x + row[:, None] * stride_m + column[None, :].to(tl.int64) * stride_k
    tile = tl.load(pointers, mask=inside & (column < k)[None, :], other=0.0).to(tl.float32)
    matrix = tl.load(rotation + place[:, None] * BLOCK + place[None, :])
    tile = tl.dot(tile, matrix, input_precision="ieee")

    reach = block_reach(tile, COUNT, BLOCK)
    exponent = scale_exponent(reach, OFFSET, THRESHOLD)
    scale = tl.where(reach == 0, 1.0, power_of_two(exponent))
    scale = tl.where(reach < float("inf"), scale, float("nan"))[:, None]

    if WIDEN != 1:
        tile = tl.math.div_rn(tile, WIDEN)
    grid = tl.math.div_rn(tile, scale)
    size = tl.minimum(tl.abs(grid), LARGEST)
    out = row[:, None] * WIDTH + column[None, :]
    if seed is None:
        level = round_magnitude_to_nearest(size, MANTISSA, FLOOR)
    else:
        draw = tl.rand(tl.load(seed), out.to(tl.int32))
        level = round_magnitude_stochastically(size, draw, MANTISSA, FLOOR, LARGEST)
    sign = grid.to(tl.int32, bitcast=True) & -0x80000000
    rounded = (level.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)

    tl.store(values + out, (rounded * scale).to(values.dtype.element_ty), mask=inside)
    if unclipped is not None:
        in_range = (tl.abs(grid) < LARGEST).to(unclipped.dtype.element_ty)
        tl.store(unclipped + out, in_range, mask=inside)
    if codes is not None:
        low, high = tl.split((encode_e2m1(level) | ((sign >> 28) & 8)).reshape(ROWS, BLOCK // 2, 2))
        byte = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(
            codes + row[:, None] * (WIDTH // 2) + byte[None, :],
            (low | (high << 4)).to(tl.uint8),
            mask=inside,
        )
        stored = tl.where(reach == 0, 127, tl.where(reach < float("inf"), exponent + 127, 255))
        tl.store(scales + row * (WIDTH // BLOCK) + block, stored.to(tl.uint8), mask=row < m)
