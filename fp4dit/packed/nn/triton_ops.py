"""Triton operators for products with packed 4-bit weights.

They are registered with torch, so that torch.compile and CUDA graphs take them as they are.

A weight of n rows and k columns is given by `codes`, two 4-bit codes in a byte with the even column
in the low half, and fp32 `scale`s, one for each row or for each group of columns. A code is a sign
and the 3-bit rank of a magnitude, and `shift` = 3 - mantissa bits tells its format. The kernels
expand it to a number of the tokens' kind, and the caller multiplies `scale` by the value of 1:

- For int8 tokens it becomes the whole number that is the value over the smallest one, which is 1/2
  in E2M1, 1/4 in E1M2 and E3M0, and 1 in INT4.
- For all others, the rank shifted up by `shift` bits is the value in FP8 E4M3 times a power of two:
  2^-6 for E2M1, 2^-7 for E1M2, 2^-4 for E3M0. INT4 is E1M2 times 2.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import triton
from jaxtyping import Float, Float8e4m3fn, Float32, Int8, UInt8
from torch import Tensor
from triton import knobs
from triton.runtime.autotuner import Autotuner
from triton.testing import do_bench

from fp4dit.packed.nn import triton_kernels
from fp4dit.packed.nn.limits import MAX_ROW_VALUES

STEP = 128  # columns of K that are multiplied at a time

Scales = Float32[Tensor, "n groups"]

Codes = UInt8[Tensor, "n half"]

TokenBytes = Float8e4m3fn[Tensor, "m k"] | Int8[Tensor, "m k"]


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


# Products of fp32 do without tensor cores, which would use TF32.
FP32_TILES = (Tile(16, 32, 4, 2),)


def list_tiles(m: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """Return the tiles for m tokens of a dtype that are worth a measurement.

    All give the same bits: each adds up an output along K in the same order, by instructions of the
    same width. 64 rows are the least that one warp group feeds to the tensor cores. With 128 rows
    two warp groups share the tokens. With half the tokens, or with more loads in flight if the
    tokens are few, an SM holds more programs, of which one expands codes while another multiplies.
    """
    if dtype == torch.float32:
        return FP32_TILES
    tokens = min(128, max(16, next_power_of_2(m)))
    third = Tile(tokens // 2, 64, 4, 4) if tokens > 64 else Tile(tokens, 64, 4, 5)
    return Tile(tokens, 64, 4, 3), Tile(tokens, 128, 8, 3), third


@cache
def tune_kernel(tokens: int, dtype: torch.dtype) -> Autotuner:
    """Return the kernel of products, which measures the tiles for the first product of a shape.

    Args:
        tokens: The number of tokens, or the power of two above it.
        dtype: Their dtype.
    """
    tiles = list_tiles(tokens, dtype)
    if knobs.runtime.interpret:
        tiles = tiles[:1]  # of a single one nothing is measured
    configs = [
        triton.Config({"TOKENS": tile.tokens, "ROWS": tile.rows}, tile.warps, tile.stages)
        for tile in tiles
    ]
    measure = partial(do_bench, warmup=5, rep=20)  # milliseconds
    tune = triton.autotune(configs, key=["n", "K", "GROUP", "SHIFT"], do_bench=measure)
    return tune(triton_kernels.packed_matmul_kernel)


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
    schema="(Tensor x, int mantissa, int min_exponent, float largest, ScalarType dtype) "
    "-> (Tensor, Tensor)",
)
def quantize_rows(
    x: Float[Tensor, "m k"], mantissa: int, min_exponent: int, largest: float, dtype: torch.dtype
) -> tuple[TokenBytes, Float32[Tensor, "m"]]:
    """Quantize each row to nearest, with scale absmax / largest, to a format that `dtype` holds.

    Args:
        dtype: E4M3, or int8 for whole numbers: the values over the smallest one of the format.

    Returns:
        The quantized rows, and the scales, which for int8 are multiplied by that smallest value.

    Raises:
        ValueError: if the rows are too wide.
    """
    m, k = x.shape
    if k > MAX_ROW_VALUES:
        raise ValueError(
            f"rows of {k} values do not fit one program: quantize at most {MAX_ROW_VALUES}"
        )
    values, scale = quantize_rows_meta(x, mantissa, min_exponent, largest, dtype)
    unit = 2.0 ** (min_exponent - mantissa) if dtype == torch.int8 else 1.0
    block = next_power_of_2(k)
    floor = max(2.0**min_exponent, torch.finfo(torch.float32).tiny)
    with torch.cuda.device_of(x):
        triton_kernels.quantize_row_kernel[(m,)](
            x.contiguous(), values, scale, k, block, mantissa, floor, largest, unit,
            num_warps=min(16, max(1, block // 512)),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return values, scale


@quantize_rows.register_fake
def quantize_rows_meta(
    x: Tensor, mantissa: int, min_exponent: int, largest: float, dtype: torch.dtype
) -> tuple[TokenBytes, Float32[Tensor, "m"]]:
    """Return empty outputs of `quantize_rows`."""
    values = x.new_empty(x.shape, dtype=dtype)
    return values, x.new_empty(x.shape[:1], dtype=torch.float32)


@torch.library.custom_op(
    "fp4dit::quantized_matmul",
    mutates_args=(),
    schema="(Tensor values, Tensor x_scale, Tensor codes, int shift, Tensor scale, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
)
def quantized_matmul(
    values: TokenBytes,
    x_scale: Float32[Tensor, "m"],
    codes: Codes,
    shift: int,
    scale: Scales,
    bias: Float[Tensor, "n"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "m n"]:
    """Multiply quantized tokens by the weight.

    E4M3 needs the tensor cores of sm_89 and later, and its sums are rounded to fp32. Sums of int8
    are exact within a group, and the result has the same bits on every GPU, those of
    `multiply_integers`.

    Raises:
        ValueError: if the kernels do not support the shapes.
    """
    return launch_matmul(values, x_scale, codes, shift, scale, bias, dtype)


@quantized_matmul.register_fake
def quantized_matmul_meta(
    values: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    shift: int,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return an empty output of `quantized_matmul`."""
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
    x: Float[Tensor, "m k"] | Int8[Tensor, "m k"],
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
    group = k // groups
    kernel = tune_kernel(next_power_of_2(m), x.dtype)
    with torch.cuda.device_of(x):
        kernel[lambda tile: (triton.cdiv(m, tile["TOKENS"]), triton.cdiv(n, tile["ROWS"]))](
            x.contiguous(), x_scale, codes.contiguous(), scale.contiguous(), bias, out,
            m, n, k, group, shift, group if x.dtype == torch.int8 else STEP, STEP=STEP,
            enable_fp_fusion=x.dtype != torch.int8,  # as `multiply_integers`: only the sum is fused
        )  # fmt: skip
    return out
