"""Triton kernels for packed 4-bit weights: a tile of a product, or a token to quantize.

They are written for Hopper. Products compile for every GPU from sm_80 on (FP8 from sm_89 on),
because Triton 3.6 has no tensor cores before it, and none for int8 but those of sm_80 on sm_100.
Tokens are quantized on sm_75, too:

- The product is computed as out^T = W x^T. On Hopper the tensor cores read their first operand from
  registers or shared memory, but the second from shared memory only. A weight that is expanded in
  registers therefore comes first; as the second operand it would have to be written and read again.
  The tokens lie in memory as FP8 requires of the second operand: along K.
- Codes are expanded in words of 32 bits, 4 codes at a time (2 in fp16), in the order of their
  columns. From the reshape the compiler knows which thread needs which columns, and loads its words
  to it: bytes never move between threads. It also sees that `tl.join` only reassembles the halves
  of one word. Expanding byte by byte makes the loop half as many instructions longer.
- Hopper's FP8 tensor cores keep about 14 bits of a sum. A step along K is 128 columns. Then the sum
  is scaled and added to the total in fp32. Sums of int8 are exact in 32 bits, so that they go on to
  the end of a group, and then one product with the scale and one addition are rounded.
- The loop is one loop, because Triton loads ahead in innermost loops only.
- One program adds up the whole K of an output, in one order, so that every run gives the same bits.

`no_type_check` keeps the type checks of the tests from wrapping code that Triton compiles.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def split_words(words, bits: tl.constexpr):
    """Split each word into pieces of `bits` bits, from the lowest up, as a last dimension."""
    return (words[:, :, None] >> (bits * tl.arange(0, 32 // bits))[None, None, :]) & (
        (1 << bits) - 1
    )


@triton.jit
@no_type_check
def split_halves(words, narrow: tl.constexpr):
    """Split each word into two halves, as a last dimension, in a type of half the width."""
    return tl.join(words.to(narrow), (words >> narrow.primitive_bitwidth).to(narrow))


@triton.jit
@no_type_check
def spread_codes(words):
    """Spread the codes of each word over two words: one code in the low half of each byte.

    The high halves hold other bits.
    """
    four = split_words(words, 16)
    four = (four | (four << 8)) & 0x00FF00FF
    return four | (four << 4)


@triton.jit
@no_type_check
def split_bytes(four, dtype: tl.constexpr):
    """Split each word into its 4 bytes, which are values of `dtype`, along the last dimension."""
    values = split_halves(split_halves(four, tl.uint16), tl.uint8)
    values = values.reshape(four.shape[0], four.shape[1] * four.shape[2] * 4)
    return values.to(dtype, bitcast=True)


@triton.jit
@no_type_check
def expand_to_e4m3(words, SHIFT: tl.constexpr):
    """Expand the 8 codes of each word to E4M3, 4 at a time: one in each byte."""
    MAGNITUDES: tl.constexpr = 0x01010101 * (7 << SHIFT)
    four = spread_codes(words)
    # In each byte, move the sign to bit 7 and the magnitude up by SHIFT bits.
    four = ((four << 4) & 0x80808080) | ((four << SHIFT) & MAGNITUDES)
    return split_bytes(four, tl.float8e4nv)


@triton.jit
@no_type_check
def expand_to_int8(words, SHIFT: tl.constexpr):
    """Expand the 8 codes of each word to whole numbers, 4 at a time: one in each byte.

    A sum of bytes never carries into the next one.
    """
    ONES: tl.constexpr = 0x01010101
    four = spread_codes(words)
    first, second, third = four & ONES, (four >> 1) & ONES, (four >> 2) & ONES  # bits of the rank
    if SHIFT == 1:  # E1M2 and INT4: the rank itself
        magnitude = four & (7 * ONES)
    elif SHIFT == 2:  # E2M1: 0 1 2 3 4 6 8 12
        magnitude = (four & (7 * ONES)) + (four & (3 * third)) + 2 * (first & second & third)
    else:  # E3M0: 2^rank / 2, and 0 for rank 0
        power = ONES + first
        power += 3 * (power & (3 * second))
        power += 15 * (power & (15 * third))
        magnitude = (power >> 1) & (0x7F * ONES)
    # Subtract negative numbers from 128 in 7 bits, then set bit 7, except for -0.
    sign = (four << 4) & (0x80 * ONES)
    one = sign >> 7
    return split_bytes(((magnitude ^ (sign - one)) + one) ^ sign, tl.int8)


@triton.jit
@no_type_check
def expand_to_fp16(words, SHIFT: tl.constexpr):
    """Expand the 8 codes of each word to fp16, 2 at a time: one in each half of a word."""
    MAGNITUDES: tl.constexpr = 0x00010001 * (7 << (7 + SHIFT))
    # Spread the 2 codes of 8 bits over the 2 halves of a word, each in the lowest bits.
    two = split_words(words, 8)
    two = two | (two << 12)
    # In each half, move the sign to bit 15 and the magnitude up by 7 + SHIFT bits.
    two = ((two << 12) & 0x80008000) | ((two << (7 + SHIFT)) & MAGNITUDES)
    values = split_halves(two, tl.uint16).reshape(words.shape[0], words.shape[1] * 8)
    return values.to(tl.float16, bitcast=True) * 256.0  # the exponents' bias is 15, and 7 in E4M3


@triton.jit
@no_type_check
def expand_operand(words, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """Expand codes to `dtype`, which holds all their values.

    Other dtypes than E4M3 and int8 are converted from fp16, because GPUs before sm_89 have no E4M3.
    """
    if dtype == tl.float8e4nv:
        return expand_to_e4m3(words, SHIFT)
    if dtype == tl.int8:
        return expand_to_int8(words, SHIFT)
    return expand_to_fp16(words, SHIFT).to(dtype)


@triton.jit
@no_type_check
def packed_matmul_kernel(
    x, x_scale, codes, scale, bias, out, m, n,
    K: tl.constexpr, GROUP: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Compute a tile of out = x_scale * (sum over groups g of scale[g] * (x[g] . codes[g])) + bias.

    `out` has m x n values, `x_scale` m, `bias` n, and `scale` n x groups. SUM columns are summed up
    before they are scaled: STEP of them, or for int8 a group.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    # Rows beyond the end are computed but not stored, which is cheaper than masks.
    t, r = token % m, row % n
    column, word = tl.arange(0, STEP), tl.arange(0, STEP // 8)
    x += t[:, None] * K + column[None, :]
    codes = codes.to(tl.pointer_type(tl.uint32)) + r[:, None] * (K // 8) + word[None, :]
    scale += r * (K // GROUP)
    SUM_TYPE: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    products = tl.zeros((ROWS, TOKENS), SUM_TYPE)
    for k in range(0, K, STEP):
        if K % STEP == 0:
            words, values = tl.load(codes + k // 8), tl.load(x + k)
        else:
            words = tl.load(codes + k // 8, mask=(word < (K - k) // 8)[None, :], other=0)
            values = tl.load(x + k, mask=(column < K - k)[None, :], other=0.0)
        weight, values = expand_operand(words, SHIFT, values.dtype), values.T
        if SUM == STEP:
            products = tl.dot(weight, values, input_precision="ieee", out_dtype=SUM_TYPE)
            total = tl.fma(products.to(tl.float32), tl.load(scale + k // GROUP)[:, None], total)
        else:
            products = tl.dot(weight, values, products, out_dtype=SUM_TYPE)
            if (k + STEP) % SUM < STEP:  # the last step of a sum
                total = tl.fma(products.to(tl.float32), tl.load(scale + k // GROUP)[:, None], total)
                products = tl.zeros((ROWS, TOKENS), SUM_TYPE)
    if x_scale is not None:
        total *= tl.load(x_scale + t)[None, :]
    if bias is not None:
        total += tl.load(bias + r).to(tl.float32)[:, None]
    inside = (token < m)[:, None] & (row < n)[None, :]
    tl.store(out + token[:, None] * n + row[None, :], total.T.to(out.dtype.element_ty), mask=inside)


@triton.jit
@no_type_check
def quantize_row_kernel(
    x, values, scales,
    K: tl.constexpr, BLOCK: tl.constexpr,
    MANTISSA: tl.constexpr, FLOOR: tl.constexpr, LARGEST: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Quantize one token to a format whose finest binade starts at FLOOR, in multiples of UNIT.

    The result is bit-exact with `Quantizer`, ties included. UNIT is a power of two.
    """
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    token = tl.load(x + row * K + column, mask=column < K, other=0.0).to(tl.float32)
    # Magnitudes are compared as integers, so that NaN is the largest.
    largest = tl.max(tl.abs(token).to(tl.int32, bitcast=True), 0)
    scale = tl.math.div_rn(largest.to(tl.float32, bitcast=True), LARGEST)
    scale = tl.where(scale < 2.0**-126, 2.0**-126, scale)
    grid = tl.math.div_rn(token, scale)
    size = tl.abs(grid)  # exceeds LARGEST by a rounding error at most, which rounding undoes
    binade = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    # Numbers of the size of `magic` lie one step of the format apart.
    magic = tl.maximum(binade, FLOOR) * (1.5 * 2.0 ** (23 - MANTISSA))
    nearest = ((size + magic) - magic).to(tl.int32, bitcast=True)
    signed = nearest | (grid.to(tl.int32, bitcast=True) & -0x80000000)
    number = signed.to(tl.float32, bitcast=True) * (1.0 / UNIT)
    if values.dtype.element_ty == tl.int8:
        number = tl.where(number == number, number, 0.0)  # the scale of NaN and infinity suffices
    tl.store(values + row * K + column, number.to(values.dtype.element_ty), mask=column < K)
    tl.store(scales + row, scale * UNIT)
