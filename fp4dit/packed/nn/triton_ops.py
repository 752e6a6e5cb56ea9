"""Triton operators for products with packed 4-bit weights.

They are registered with torch, so that torch.compile and CUDA graphs take them as they are.

A weight of n rows and k columns is given by `codes`, two 4-bit codes in a byte with the even column
in the low half, and fp32 `scale`s, one for each row or for each group of columns. A code is a sign
and the 3-bit rank of a magnitude. Shifted up by `shift` = 3 - mantissa bits, it is the value in FP8
E4M3 times a power of two: 2^-6 for E2M1, 2^-7 for E1M2, 2^-4 for E3M0. The caller divides `scale`
by it. INT4 is E1M2 times 2.
"""

from dataclasses import dataclass

import torch
import triton
from jaxtyping import Float, Float8e4m3fn, Float32, UInt8
from torch import Tensor

from fp4dit.packed.nn import triton_kernels
from fp4dit.packed.nn.limits import MAX_ROW_VALUES

STEP = 128  # columns of K that are summed up before a scale is applied

Scales = Float32[Tensor, "n groups"]

Codes = UInt8[Tensor, "n half"]


@dataclass(frozen=True)
class Tile:
    """Tile of the output that one program computes.

    Args:
        tokens: Rows of the input.
        rows: Rows of the weight.
        warps: Warps of a program.
        stages: Steps along K whose loads are in flight.
    """

    tokens: int
    rows: int
    warps: int
    stages: int


def choose_tile(m: int, dtype: torch.dtype) -> Tile:
    """Choose the tile for m tokens of a dtype.

    64 rows are the least that one warp group feeds to the tensor cores. More rows would fill the
    registers of an SM with one program; with two programs, one expands codes while the other
    multiplies.
    """
    if dtype == torch.float32:  # without tensor cores, which would use TF32
        return Tile(16, 32, 4, 2)
    return Tile(min(128, max(16, next_power_of_2(m))), 64, 4, 3)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def expand_codes(codes: Codes, shift: int) -> Float8e4m3fn[Tensor, "n k"]:
    """Expand codes to E4M3 as the kernels do in registers. Tests compare the kernels with it."""
    nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return ((nibbles & 8) << 4 | (nibbles & 7) << shift).view(torch.float8_e4m3fn)


def is_supported_shape(k: int, groups: int) -> bool:
    """Return whether the kernels support rows of k columns with `groups` scales each."""
    return k % 16 == 0 and k % groups == 0 and (groups == 1 or k // groups % STEP == 0)


@torch.library.custom_op(
    "fp4dit::quantize_rows",
    mutates_args=(),
    schema="(Tensor x, int mantissa, int min_exponent, float largest) -> (Tensor, Tensor)",
)
def quantize_rows(
    x: Float[Tensor, "m k"], mantissa: int, min_exponent: int, largest: float
) -> tuple[Float8e4m3fn[Tensor, "m k"], Float32[Tensor, "m"]]:
    """Quantize each row to nearest, with scale absmax / largest, to a format that E4M3 holds.

    Returns:
        The quantized rows in E4M3, and the scales.

    Raises:
        ValueError: if the rows are too wide.
    """
    m, k = x.shape
    if k > MAX_ROW_VALUES:
        raise ValueError(
            f"rows of {k} values do not fit one program: quantize at most {MAX_ROW_VALUES}"
        )
    values, scale = quantize_rows_meta(x, mantissa, min_exponent, largest)
    block = next_power_of_2(k)
    floor = max(2.0**min_exponent, torch.finfo(torch.float32).tiny)
    with torch.cuda.device_of(x):
        triton_kernels.quantize_row_kernel[(m,)](
            x.contiguous(), values, scale, k, block, mantissa, floor, largest,
            num_warps=min(16, max(1, block // 512)),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return values, scale


@quantize_rows.register_fake
def quantize_rows_meta(
    x: Tensor, mantissa: int, min_exponent: int, largest: float
) -> tuple[Float8e4m3fn[Tensor, "m k"], Float32[Tensor, "m"]]:
    """Return empty outputs of `quantize_rows`."""
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op(
    "fp4dit::fp8_matmul",
    mutates_args=(),
    schema="(Tensor values, Tensor x_scale, Tensor codes, int shift, Tensor scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
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
    """Multiply quantized tokens by the weight, in the FP8 tensor cores of sm_89 and later.

    Raises:
        ValueError: if the kernels do not support the shapes.
    """
    return launch_matmul(values, x_scale, codes, shift, scale, bias, dtype)


@fp8_matmul.register_fake
def fp8_matmul_meta(
    values: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    shift: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return an empty output of `fp8_matmul`."""
    return values.new_empty(values.shape[0], codes.shape[0], dtype=dtype)


@torch.library.custom_op(
    "fp4dit::weight_only_matmul",
    mutates_args=(),
    schema="(Tensor x, Tensor codes, int shift, Tensor scale, Tensor? bias) -> Tensor",
)
def weight_only_matmul(
    x: Float[Tensor, "m k"],
    codes: Codes,
    shift: int,
    scale: Scales,
    bias: Float[Tensor, "n"] | None,
) -> Float[Tensor, "m n"]:
    """Multiply tokens in 16 or 32 bits by the weight.

    The codes are exact in the dtype of x, and the scales stay in fp32.

    Raises:
        ValueError: if the kernels do not support the shapes.
    """
    return launch_matmul(x, None, codes, shift, scale, bias, x.dtype)


@weight_only_matmul.register_fake
def weight_only_matmul_meta(
    x: Tensor, codes: Tensor, shift: int, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Return an empty output of `weight_only_matmul`."""
    return x.new_empty(x.shape[0], codes.shape[0])


def launch_matmul(
    x: Float[Tensor, "m k"],
    x_scale: Float32[Tensor, "m"] | None,
    codes: Codes,
    shift: int,
    scale: Scales,
    bias: Float[Tensor, "n"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """Launch the kernel of a product.

    Args:
        x_scale: One scale for each token, or None if the tokens are not quantized.
        dtype: The dtype of the output.
    """
    (m, k), (n, half), groups = x.shape, codes.shape, scale.shape[1]
    if half * 2 != k or not is_supported_shape(k, groups):
        raise ValueError(
            f"no kernel for rows of {k} values times {half} bytes of codes with {groups} scales: "
            "k has to be twice the bytes and a multiple of 16, and a group the whole row or a "
            f"multiple of {STEP}"
        )
    out = x.new_empty(m, n, dtype=dtype)
    tile = choose_tile(m, x.dtype)
    grid = (triton.cdiv(m, tile.tokens), triton.cdiv(n, tile.rows))
    with torch.cuda.device_of(x):
        triton_kernels.packed_matmul_kernel[grid](
            x.contiguous(), x_scale, codes.contiguous(), scale.contiguous(), bias, out,
            m, n, k, k // groups, shift, tile.tokens, tile.rows, STEP,
            num_warps=tile.warps, num_stages=tile.stages,  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out
