"""Triton programs for 4-bit weights: one tile of a product each, or one token to quantize.

They are written for Hopper, and compile for everything from sm_80 on (FP8 from sm_89 on):

- What is computed is out^T = W x^T. There the tensor cores read their first operand from registers, but the second
  always from shared memory. A weight that is expanded in registers is hence the first, or it would take the way
  through shared memory and back. The tokens lie in memory as the second has to: K-major, which FP8 insists on.
- Codes are expanded in words of 32 bits, 4 at a time, the even columns apart from the odd ones. `tl.join` interleaves
  them. The compiler knows from the reshape in which thread the tensor cores want a column, and loads words accordingly:
  no thread needs bytes of another.
- Hopper's FP8 tensor cores keep about 14 bits of a sum. A step along K is 128 columns; then the sum is scaled and
  added to the total in fp32.
- One program adds up a number's whole K, in one order: every run gives the same bits.
"""

import triton
import triton.language as tl


@triton.jit
def four_bytes(words):
    """The bytes of each word, as a last dimension."""
    return (words[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]).to(tl.uint8)


@triton.jit
def expanded(words, SHIFT: tl.constexpr):
    """The E4M3 bytes of 8 codes a word."""
    MAGNITUDES: tl.constexpr = 0x01010101 * (7 << SHIFT)
    even = ((words << 4) & 0x80808080) | ((words << SHIFT) & MAGNITUDES)
    odd = (words & 0x80808080) | ((words >> (4 - SHIFT)) & MAGNITUDES)
    return tl.join(four_bytes(even), four_bytes(odd)).reshape(words.shape[0], words.shape[1] * 8)


@triton.jit
def operand(e4m3, dtype: tl.constexpr):
    """The values of E4M3 bytes, exact in every `dtype`. GPUs before sm_89 have no E4M3, so the others go by fp16."""
    if dtype == tl.float8e4nv:
        return e4m3.to(tl.float8e4nv, bitcast=True)
    byte = e4m3.to(tl.uint16)
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)
    return (half.to(tl.float16, bitcast=True) * 256.0).to(dtype)  # the exponents' biases are 15 and 7


@triton.jit
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
        weight = operand(expanded(words, SHIFT), values.dtype)
        total += tl.dot(weight, values.T, input_precision="ieee") * tl.load(scale + k // GROUP)[:, None]
    if x_scale is not None:
        total *= tl.load(x_scale + t)[None, :]
    if bias is not None:
        total += tl.load(bias + r).to(tl.float32)[:, None]
    inside = (token < m)[:, None] & (row < n)[None, :]
    tl.store(out + token[:, None] * n + row[None, :], total.T.to(out.dtype.element_ty), mask=inside)


@triton.jit
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
    size = tl.abs(grid)
    size = tl.where(size > LARGEST, LARGEST, size)
    binade = (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    whole = tl.maximum(binade, FLOOR) * (1.5 * 2.0 ** (23 - MANTISSA))  # numbers of its size lie one step apart
    nearest = ((size + whole) - whole).to(tl.int32, bitcast=True)
    signed = nearest | (grid.to(tl.int32, bitcast=True) & -0x80000000)
    tl.store(values + row * K + column, signed.to(tl.float32, bitcast=True).to(tl.float8e4nv), mask=column < K)
    tl.store(scales + row, scale)
