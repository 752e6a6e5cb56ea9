"""Triton programs for 4-bit weights: one tile of a product each, or one token to quantize.

They are written for Hopper, and compile for everything from sm_80 on (FP8 from sm_89 on):

- What is computed is out^T = W x^T. There the tensor cores read their first operand from registers or shared memory,
  but the second from shared memory only. So a weight that is expanded in registers comes first, or it would have to be
  written and read once more. The tokens lie in memory as FP8 wants the second: along K.
- Codes are expanded in words of 32 bits, 4 at a time (2 in fp16), in the order of their columns. From the reshape the
  compiler knows which thread needs which columns, and loads it their words: bytes never change places. It also sees
  that `tl.join` only puts a word's own halves together again. Expanded byte by byte, the loop has half as many
  instructions more.
- Hopper's FP8 tensor cores keep about 14 bits of a sum. A step along K is 128 columns; then the sum is scaled and
  added to the total in fp32.
- One program adds up a number's whole K, in one order: every run gives the same bits.

`no_type_check` keeps the type checks of our tests from wrapping what Triton reads as it stands.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def pieces(words, bits: tl.constexpr):
    """Each word cut into pieces of so many bits, from the lowest up, as a last dimension."""
    return (words[:, :, None] >> (bits * tl.arange(0, 32 // bits))[None, None, :]) & ((1 << bits) - 1)


@triton.jit
@no_type_check
def halves(words, narrow: tl.constexpr):
    """Both halves of each word, as a last dimension, in a type of half the width."""
    return tl.join(words.to(narrow), (words >> narrow.primitive_bitwidth).to(narrow))


@triton.jit
@no_type_check
def in_e4m3(words, SHIFT: tl.constexpr):
    """The values of 8 codes a word, 4 at a time: one in each byte."""
    MAGNITUDES: tl.constexpr = 0x01010101 * (7 << SHIFT)
    four = pieces(words, 16)
    four = (four | (four << 8)) & 0x00FF00FF
    four = four | (four << 4)
    four = ((four << 4) & 0x80808080) | ((four << SHIFT) & MAGNITUDES)
    values = halves(halves(four, tl.uint16), tl.uint8).reshape(words.shape[0], words.shape[1] * 8)
    return values.to(tl.float8e4nv, bitcast=True)


@triton.jit
@no_type_check
def in_fp16(words, SHIFT: tl.constexpr):
    """The same values, 2 at a time: one in each half of a word."""
    MAGNITUDES: tl.constexpr = 0x00010001 * (7 << (7 + SHIFT))
    two = pieces(words, 8)
    two = two | (two << 12)
    two = ((two << 12) & 0x80008000) | ((two << (7 + SHIFT)) & MAGNITUDES)
    values = halves(two, tl.uint16).reshape(words.shape[0], words.shape[1] * 8)
    return values.to(tl.float16, bitcast=True) * 256.0  # the exponents' bias is 15, and 7 in E4M3


@triton.jit
@no_type_check
def operand(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """The codes' values, which every `dtype` holds. What is not FP8 goes by fp16: GPUs before sm_89 have no E4M3."""
    if dtype == tl.float8e4nv:
        return in_e4m3(words, SHIFT)
    return in_fp16(words, SHIFT).to(dtype)


@triton.jit
@no_type_check
def product(
    x, x_scale, codes, scale, bias, out, m, n,
    K: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out[m, n] = x_scale[m] * sum over groups g of scale[n, g] * (x[m, g] . codes[n, g]) + bias[n]"""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    t, r = token % m, row % n  # what lies beyond the end is computed but not stored: cheaper than masks
    column, word = tl.arange(0, STEP), tl.arange(0, STEP // 8)
    x += t[:, None] * K + column[None, :]
    codes = codes.to(tl.pointer_type(tl.uint32)) + r[:, None] * (K // 8) + word[None, :]
    scale += r * (K // GROUP)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in range(0, K, STEP):
        if K % STEP == 0:
            words, values = tl.load(codes + k // 8), tl.load(x + k)
        else:
            words = tl.load(codes + k // 8, mask=(word < (K - k) // 8)[None, :], other=0)
            values = tl.load(x + k, mask=(column < K - k)[None, :], other=0.0)
        weight = operand(words, SHIFT, values.dtype)
        total += tl.dot(weight, values.T, input_precision="ieee") * tl.load(scale + k // GROUP)[:, None]
    if x_scale is not None:
        total *= tl.load(x_scale + t)[None, :]
    if bias is not None:
        total += tl.load(bias + r).to(tl.float32)[:, None]
    inside = (token < m)[:, None] & (row < n)[None, :]
    tl.store(out + token[:, None] * n + row[None, :], total.T.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def quantized_row(
    x, values, scales,
    K: tl.constexpr, BLOCK: tl.constexpr, MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """One token onto a format whose finest binade starts at FLOOR: to the bit `Quantizer`, also in its rounding."""
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    token = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(token).to(tl.int32, bitcast=True), 0)  # as integers, so that NaN is the largest
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < 2.0**-126, 2.0**-126, scale)
    grid = tl.math.div_rn(token, scale)
    size = tl.abs(grid)  # beyond LARGEST by rounding at most, which the next one undoes
    binade = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    whole = tl.maximum(binade, FLOOR) * (1.5 * 2.0 ** (23 - MANTISSA))  # numbers of its size lie one step apart
    nearest = ((size + whole) - whole).to(tl.int32, bitcast=True)
    signed = nearest | (grid.to(tl.int32, bitcast=True) & -0x80000000)
    tl.store(values + row * K + column, signed.to(tl.float32, bitcast=True).to(tl.float8e4nv), mask=column < K)
    tl.store(scales + row, scale)
