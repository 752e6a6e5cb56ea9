"""Numbers of one byte that tensor cores multiply, E4M3 and int8, and tokens made of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from fp4dit.numerics.block_scales import E4M3
from fp4dit.numerics.formats import NumberFormat
from fp4dit.packed.nn.token_quant import round_to_grid


@dataclass(frozen=True)
class ByteNumbers:
    """Numbers of one byte, and the formats whose values are such numbers times a unit.

    Attributes:
        dtype: The dtype of the numbers.
        hold: Returns whether they hold all values of a signed format.
        find_unit: Returns the value of a format that the number 1 stands for.

    Example:
        >>> INT8_NUMBERS.hold(floating(2, 3)), INT8_NUMBERS.find_unit(floating(2, 3))
        (True, 0.125)
    """

    dtype: torch.dtype
    hold: Callable[[NumberFormat], bool]
    find_unit: Callable[[NumberFormat], float]


def fits_e4m3(fmt: NumberFormat) -> bool:
    """Return whether E4M3 holds all values of a format.

    Only attributes are compared, because torch.compile cannot trace a comparison of all values.
    """
    has_range = fmt.smallest >= E4M3.smallest and fmt.max <= E4M3.max
    return has_range and fmt.mantissa <= E4M3.mantissa


def fits_int8(fmt: NumberFormat) -> bool:
    """Return whether int8 holds all values of a signed format over the smallest one."""
    return fmt.max / fmt.smallest <= 127


E4M3_NUMBERS = ByteNumbers(torch.float8_e4m3fn, fits_e4m3, lambda fmt: 1.0)
INT8_NUMBERS = ByteNumbers(torch.int8, fits_int8, lambda fmt: fmt.smallest)


def quantize_to_bytes(
    x: Float[Tensor, "*b k"], fmt: NumberFormat, numbers: ByteNumbers
) -> tuple[Tensor, Float32[Tensor, "m"]]:
    """Quantize each token to a format that `numbers` hold, with its abs-max scale.

    Returns:
        The numbers of all tokens, m x k, and the value of the number 1 in each.
    """
    rows = x.flatten(0, -2)
    if x.is_cuda:
        from fp4dit.packed.nn import triton_ops  # imports Triton, which not every machine has

        return triton_ops.quantize_rows(
            rows, fmt.mantissa, fmt.min_exponent, fmt.max, numbers.dtype
        )
    unit = numbers.find_unit(fmt)
    values, scale = round_to_grid(rows.float(), fmt)
    # The scale of a token that holds NaN or infinity makes its products NaN.
    return values.nan_to_num_(0.0).div_(unit).to(numbers.dtype), scale[:, 0] * unit
