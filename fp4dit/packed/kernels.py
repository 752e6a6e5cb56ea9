"""Products with packed 4-bit weights on a GPU, as operators that torch.compile and CUDA graphs take as they are.

A weight of n rows and k columns comes as `codes`, two of 4 bits a byte with the even column in the low half, and
`scale`, fp32, one for each row or for each group of columns. A code is a sign and a 3-bit index of a magnitude. Moved
up by `shift` = 3 - mantissa bits it is the value in FP8 E4M3 times a power of two, which the caller divides `scale`
by: 2^-6 for E2M1, 2^-7 for E1M2, 2^-4 for E3M0. INT4 is E1M2 times 2.
"""

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float, Float8e4m3fn, Float32, UInt8
from torch import Tensor

from fp4dit.packed import programs
from fp4dit.packed.matmul import WIDEST

STEP = 128  # columns of K that are summed up before a scale is applied
Scales = Float32[Tensor, "n groups"]
Codes = UInt8[Tensor, "n half"]


@dataclass(frozen=True)
class Tile:
    """What one program computes, and with how many warps and how many steps of K under way."""

    tokens: int
    rows: int
    warps: int
    stages: int


def tile(m: int, dtype: torch.dtype) -> Tile:
    """64 rows are what one warp group gives the tensor cores at least. More would fill the registers of an SM with one
    program; of two, one expands while the other multiplies."""
    if dtype == torch.float32:  # no tensor cores: their fp32 is TF32
        return Tile(16, 32, 4, 2)
    return Tile(min(128, max(16, power_of_2(m))), 64, 4, 3)


def power_of_2(n: int) -> int:
    """The least that is not below n."""
    return 1 << (n - 1).bit_length()


def expand(codes: Codes, shift: int) -> Float8e4m3fn[Tensor, "n k"]:
    """The values that the kernels multiply with."""
    both = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return ((both & 8) << 4 | (both & 7) << shift).view(torch.float8_e4m3fn)


def supported(k: int, groups: int) -> bool:
    """Whether the kernels take rows of k columns with so many scales."""
    return k % 16 == 0 and k % groups == 0 and (groups == 1 or k // groups % STEP == 0)


@torch.library.custom_op(
    "fp4dit::quantize_rows",
    mutates_args=(),
    schema="(Tensor x, int mantissa, int min_exponent, float largest) -> (Tensor, Tensor)",
)
def quantize_rows(
    x: Float[Tensor, "m k"], mantissa: int, min_exponent: int, largest: float
) -> tuple[Float8e4m3fn[Tensor, "m k"], Float32[Tensor, "m"]]:
    """Each row over its scale, absmax / largest, to nearest in a format that E4M3 holds; and the scales.

    Raises:
        ValueError: if the rows are too wide.
    """
    m, k = x.shape
    if k > WIDEST:
        raise ValueError(f"rows of {k} values do not fit one program: quantize at most {WIDEST}")
    values, scale = like_quantized(x, mantissa, min_exponent, largest)
    block = power_of_2(k)
    floor = max(2.0**min_exponent, torch.finfo(torch.float32).tiny)
    with torch.cuda.device_of(x):
        programs.quantized_row[(m,)](
            x.contiguous(), values, scale, k, block, mantissa, floor, largest,
            num_warps=min(16, max(1, block // 512)),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return values, scale


@quantize_rows.register_fake
def like_quantized(
    x: Tensor, mantissa: int, min_exponent: int, largest: float
) -> tuple[Float8e4m3fn[Tensor, "m k"], Float32[Tensor, "m"]]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op(
    "fp4dit::fp8_matmul",
    mutates_args=(),
    schema="(Tensor values, Tensor x_scale, Tensor codes, int shift, Tensor scale, Tensor? bias, ScalarType dtype) "
    "-> Tensor",
)
def fp8_matmul(
    values: Float8e4m3fn[Tensor, "m k"],
    x_scale: Float32[Tensor, "m"],
    codes: Codes,
    shift: int,
    scale: Scales,
    bias: Float[Tensor, "n"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """Quantized tokens times the weight, in the FP8 tensor cores of sm_89 and later.

    Raises:
        ValueError: if the shapes are not `supported`.
    """
    return multiplied(values, x_scale, codes, shift, scale, bias, dtype)


@fp8_matmul.register_fake
def _(
    values: Tensor, x_scale: Tensor, codes: Tensor, shift: int, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    return values.new_empty(values.shape[0], codes.shape[0], dtype=dtype)


@torch.library.custom_op(
    "fp4dit::weight_only_matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, int shift, Tensor scale, Tensor? bias) -> Tensor",
)
def weight_only_matmul(
    x: Float[Tensor, "m k"], codes: Codes, shift: int, scale: Scales, bias: Float[Tensor, "n"] | None
) -> Float[Tensor, "m n"]:
    """Tokens as they are times the weight. Its codes are exact in the dtype of x, and its scales stay fp32.

    Raises:
        ValueError: if the shapes are not `supported`.
    """
    return multiplied(x, None, codes, shift, scale, bias, x.dtype)


@weight_only_matmul.register_fake
def _(x: Tensor, codes: Tensor, shift: int, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


def multiplied(
    x: Float[Tensor, "m k"],
    x_scale: Float32[Tensor, "m"] | None,
    codes: Codes,
    shift: int,
    scale: Scales,
    bias: Float[Tensor, "n"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    (m, k), (n, half), groups = x.shape, codes.shape, scale.shape[1]
    if half * 2 != k or not supported(k, groups):
        raise ValueError(
            f"no kernel for rows of {k} values times {half} bytes of codes with {groups} scales: k has to be twice the "
            f"bytes and a multiple of 16, and a group the whole row or a multiple of {STEP}"
        )
    out = x.new_empty(m, n, dtype=dtype)
    t = tile(m, x.dtype)
    with torch.cuda.device_of(x):
        programs.product[(triton.cdiv(m, t.tokens), triton.cdiv(n, t.rows))](
            x.contiguous(), x_scale, codes.contiguous(), scale.contiguous(), bias, out, m, n, k, k // groups, shift,
            t.tokens, t.rows, STEP,
            num_warps=t.warps, num_stages=t.stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out
