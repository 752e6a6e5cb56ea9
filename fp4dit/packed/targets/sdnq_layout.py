"""The tensors of SDNQ: codes of 4 and 8 bits, and scales by rows or groups.

Codes of less than 8 bits are packed in the order of the weight's values, as `sdnq_bits` says. Codes
of floats are sign, exponent and mantissa. Signed integers of n < 8 bits are stored plus 2^(n - 1).
"""

from math import prod

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.formats import Format, NumberFormat, floating, integer
from fp4dit.numerics.qparams import Affine, Offset
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.grid import PLAIN, GridWeight, matrix_shape
from fp4dit.packed.targets.sdnq_bits import pack, unpack
from fp4dit.utils.errors import UserError

WEIGHT_DTYPES: dict[str, NumberFormat] = {
    **{f"int{bits}": integer(bits) for bits in range(2, 9)},
    **{f"uint{bits}": integer(bits, signed=False) for bits in range(2, 9)},
    **{
        f"float{bits}_e{exponent}m{bits - 1 - exponent}fn": floating(exponent, bits - 1 - exponent)
        for bits in range(3, 8)
        for exponent in range(1, min(bits, 6))
    },
    "float8_e1m6fn": floating(1, 6),
    "float8_e2m5fn": floating(2, 5),
    "float8_e3m4fn": floating(3, 4),
    "float8_e4m3fn": floating(4, 3, reserved=1),
    "float8_e4m3fn_sdnq": floating(4, 3),
    "float8_e5m2": floating(5, 2, reserved=4),
    "float8_e5m2fn": floating(5, 2),
}

# The dtypes that are stored as such. All others are stored as bytes of codes.
TORCH_DTYPES = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def encode_points(grid: GridWeight) -> tuple[str, UInt8[Tensor, "o k"]]:
    """Return the name of a weight's dtype, and its codes.

    Raises:
        UserError: if SDNQ has no such dtype, or it goes with other qparams.
    """
    names: dict[Format, str] = {fmt: name for name, fmt in WEIGHT_DTYPES.items()}
    if grid.fmt not in names:
        known = ", ".join(fmt.name for fmt in names)
        raise UserError(f"its values are {grid.fmt.name}: use weight.format of {known}, or {PLAIN}")
    name, fmt = names[grid.fmt], grid.fmt
    if isinstance(grid.qparams, Affine | Offset) != (fmt.min == 0):
        raise UserError(
            f"{name} goes with {'zero points' if fmt.min == 0 else 'scales alone'}: use "
            f"weight.scale.rule={'minmax' if fmt.min == 0 else 'absmax'}"
        )
    if fmt.name.startswith("int"):
        middle = 2 ** (fmt.bits - 1)
        return name, (grid.points.cpu() + middle).to(torch.uint8)
    return name, encode_values(grid.points.cpu(), list_code_values(fmt))


def grouped_shape(shape: tuple[int, ...], n: int) -> tuple[int, ...]:
    """Return a weight's shape with its input channels in n groups, if there is more than one."""
    rows, channels, *kernel = shape
    return (rows, n, channels // n, *kernel) if n > 1 else shape


def store_codes(codes: UInt8[Tensor, "o k"], weights_dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Return codes as SDNQ stores them."""
    bits = int(WEIGHT_DTYPES[weights_dtype].bits)
    if bits < 8:
        return pack(codes.flatten(), bits)
    if weights_dtype == "int8":
        return (codes.int() - 128).to(torch.int8).view(shape)
    return codes.view(TORCH_DTYPES.get(weights_dtype, torch.uint8)).view(shape)


def read_points(stored: StoredLayer) -> Float[Tensor, "o k"]:
    """Return the value of each code.

    Raises:
        UserError: if the codes have another dtype or size.
    """
    weights_dtype, codes = stored.settings["weights_dtype"], stored.tensors["weight"]
    fmt = WEIGHT_DTYPES[weights_dtype]
    count = prod(stored.shape)
    dtype = TORCH_DTYPES.get(weights_dtype, torch.uint8)
    if codes.dtype != dtype or codes.numel() * 8 != count * fmt.bits:
        raise UserError(
            f"its codes are {list(codes.shape)} of {codes.dtype}, and have to be {count} of "
            f"{weights_dtype}"
        )
    flat = codes.contiguous().flatten()
    if weights_dtype == "int8":
        return flat.float().view(matrix_shape(stored.shape))
    flat, bits = flat.view(torch.uint8), int(fmt.bits)
    unpacked = unpack(flat, bits) if bits < 8 else flat
    if weights_dtype.startswith("int"):
        return (unpacked.float() - 2 ** (bits - 1)).view(matrix_shape(stored.shape))
    return list_code_values(fmt)[unpacked.int()].view(matrix_shape(stored.shape))


def read_scale(stored: StoredLayer, suffix: str) -> Float[Tensor, "blocks 1"]:
    """Return the scales or zero points of a layer in fp32, one for each block.

    Raises:
        UserError: if they do not have the shape of such a layer, or differ within a block.
    """
    value, (rows, channels, *kernel) = stored.tensors[suffix], stored.shape
    n = value.shape[1] if value.ndim == len(stored.shape) + 1 else 1
    ones = (rows, *([n] if value.ndim == len(stored.shape) + 1 else []), 1, *kernel)
    if tuple(value.shape) != ones or channels % n or not value.is_floating_point():
        raise UserError(
            f"its {suffix} is {list(value.shape)} of {value.dtype}, which does not fit a weight "
            f"{list(stored.shape)}"
        )
    columns = value.float().reshape(rows * n, -1)
    if not ((columns == columns[:, :1]) | columns.isnan()).all():
        raise UserError(f"its {suffix} differs between the places of its kernel")
    return columns[:, :1]
