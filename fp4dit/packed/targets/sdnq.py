"""SDNQ, the quantization engine of SD.Next, which diffusers loads through the package `sdnq`.

A weight is codes times scales, computed in fp32 and rounded to the dtype of the model. Scales and
zero points are stored in fp32, but diffusers casts them to the dtype that a model is loaded in.
Codes of 4 bits are packed in the order of the weight's values, the first one in the low half of a
byte. Codes of floats are sign, exponent and mantissa. Signed integers of 4 bits are stored plus 8.
The formats were read from sdnq 0.2.8.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from fp4dit.numerics.formats import Format, NumberFormat, floating, integer
from fp4dit.numerics.qparams import Affine, QParams, Scale
from fp4dit.packed.encoding.bitpack import pack_bits, unpack_bits
from fp4dit.packed.encoding.codes import encode_values, list_code_values
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.config_files import ConfigTarget
from fp4dit.packed.targets.grid import PLAIN, GridWeight, matrix_shape, read_grid
from fp4dit.utils.errors import UserError

WEIGHT_DTYPES: dict[str, NumberFormat] = {
    "int4": integer(4),
    "uint4": integer(4, signed=False),
    "int8": integer(8),
    "uint8": integer(8, signed=False),
    "float4_e1m2fn": floating(1, 2),
    "float4_e2m1fn": floating(2, 1),
    "float4_e3m0fn": floating(3, 0),
    "float8_e1m6fn": floating(1, 6),
    "float8_e2m5fn": floating(2, 5),
    "float8_e3m4fn": floating(3, 4),
    "float8_e4m3fn": floating(4, 3, reserved=1),
    "float8_e4m3fn_sdnq": floating(4, 3),
    "float8_e5m2": floating(5, 2, reserved=4),
    "float8_e5m2fn": floating(5, 2),
}

ALIASES = {"fp4": "float4_e2m1fn", "fp8": "float8_e4m3fn"}

# The dtypes that are stored as such. All others are stored as bytes of codes.
TORCH_DTYPES = {
    "int8": torch.int8,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}

UNSUPPORTED_OPTIONS = (
    "use_svd",
    "use_hadamard",
    "use_codebook",
    "use_codebook_scale",
    "scale_dtype",
)

INEXACT_ZEROS = (
    "its zero points times its scales are rounded, so that readers would get another weight: use "
    "weight.scale.dtype=fp16 and export_format.dtype=float32"
)


@dataclass(frozen=True)
class SDNQ(ConfigTarget):
    """Codes of 4 or 8 bits with scales in fp32, one for each row or group, mixed by layer.

    Example:
        >>> stored = SDNQ().store(packed_layer, (24, 128), torch.float32)
        >>> stored.settings
        {'weights_dtype': 'float4_e2m1fn', 'group_size': 128}
    """

    name: ClassVar[str] = "sdnq"
    packages: ClassVar[str] = "diffusers 'sdnq>=0.2.2'"
    quant_method: ClassVar[str] = "sdnq"

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        grid = read_grid(layer)
        weights_dtype, codes = encode_points(grid)
        spatial, n = prod(shape[2:]), grid.blocks_per_row
        if grid.width % spatial or len(codes.flatten()) % 2:
            raise UserError(f"its groups are not of whole input channels: {PLAIN}")
        tensors = {"weight": store_codes(codes, weights_dtype, grouped_shape(shape, n))}
        for suffix, value in split_qparams(grid.qparams).items():
            column = grid.by_row(value).cpu()
            tensors[suffix] = column.view(grouped_shape((len(column), n, *[1] * len(shape[2:])), n))
            if shape[2:]:  # a scale for each place of the kernel
                tensors[suffix] = tensors[suffix].expand(*tensors[suffix].shape[:-2], *shape[2:])
        group_size = grid.width // spatial if n > 1 else -1
        stored = StoredLayer(
            shape, tensors, {"weights_dtype": weights_dtype, "group_size": group_size}
        )
        check_fused(stored, layer.dtype)
        return stored

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        values, scale, zero = read_values(stored, dtype)
        weight = values * scale if zero is None else values * scale + zero
        return weight.view(matrix_shape(stored.shape)).to(dtype)

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        if "zero_point" in stored.tensors:
            return INEXACT_ZEROS
        return (
            f"its scales are not numbers of {dtype}, to which diffusers casts them if it loads the "
            "model in this dtype: use weight.scale.dtype=bf16 for bfloat16, "
            "weight.scale.dtype=fp16 for float16, or export_format.dtype=float32"
        )

    def decode(self, stored: StoredLayer) -> GridWeight:
        rows, k = matrix_shape(stored.shape)
        fmt, points = WEIGHT_DTYPES[stored.settings["weights_dtype"]], read_points(stored)
        scale = read_scale(stored, "scale")
        qparams: QParams = Scale(scale)
        if "zero_point" in stored.tensors:
            qparams = make_affine(scale, read_scale(stored, "zero_point"), fmt)
        elif fmt == integer(fmt.bits) and bool((points < fmt.min).any()):
            # The lowest integer, which the symmetric format lacks.
            middle = 2.0 ** (fmt.bits - 1)
            fmt, points = integer(fmt.bits, signed=False), points + middle
            qparams = Affine(scale, torch.full_like(scale, middle))
        return GridWeight(fmt, points, qparams, k * rows // len(scale))

    def describe(self, stored: StoredLayer) -> str:
        size = stored.settings["group_size"]
        return (
            f"{stored.settings['weights_dtype']} in {'rows' if size < 0 else f'groups of {size}'}"
        )

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        kinds = [dict(layer.settings) for layer in model.layers.values()]
        common = max(kinds, key=kinds.count)
        others = {}
        for name, layer in model.layers.items():
            if layer.settings != common:
                others[f"{name}.weight"] = dict(layer.settings)
        return {
            **common,
            "modules_quant_config": others,
            "modules_to_not_convert": [f"{name}.weight" for name in model.left],
            "quant_conv": any(len(layer.shape) > 2 for layer in model.layers.values()),
            "use_quantized_matmul": False,
            "dequantize_fp32": True,
            "add_skip_keys": False,
        }

    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        if "scale" not in tensors:
            return None
        settings = find_settings(f"{name}.weight", config)
        for option in UNSUPPORTED_OPTIONS:
            if settings.get(option) not in (None, False, "none"):
                raise UserError(f"{name} has {option}, which has no counterpart here")
        if not tensors.keys() <= {"weight", "scale", "zero_point"}:
            raise UserError(f"{name} has the tensors {', '.join(tensors)}, which are not read")
        weights_dtype = settings.get("weights_dtype", "int8")
        weights_dtype = ALIASES.get(weights_dtype, weights_dtype)
        if weights_dtype not in WEIGHT_DTYPES:
            names = ", ".join(WEIGHT_DTYPES)
            raise UserError(f"{name} is {weights_dtype}, and only {names} are read")
        return {"weights_dtype": weights_dtype, "group_size": settings.get("group_size", 0)}


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
    if isinstance(grid.qparams, Affine) != (fmt.min == 0):
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
    if WEIGHT_DTYPES[weights_dtype].bits == 4:
        return pack_bits(codes.flatten(), 4)
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
    unpacked = unpack_bits(flat.view(torch.uint8), int(fmt.bits), count)
    if weights_dtype == "int4":
        return (unpacked.float() - 8).view(matrix_shape(stored.shape))
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


def split_qparams(qparams: QParams) -> dict[str, Float[Tensor, "blocks 1"]]:
    """Return scales, and what is added to scaled codes, by the names of their tensors.

    Raises:
        UserError: if the qparams are not scales, or scales and zero points.
    """
    if isinstance(qparams, Scale):
        return {"scale": qparams.scale}
    if isinstance(qparams, Affine):
        return {"scale": qparams.scale, "zero_point": -qparams.zero * qparams.scale}
    raise UserError(
        f"its blocks have {type(qparams).__name__.lower()} scales: use weight.scale.rule=absmax"
    )


def make_affine(
    scale: Float[Tensor, "blocks 1"], added: Float[Tensor, "blocks 1"], fmt: NumberFormat
) -> Affine:
    """Return qparams with the zero points that make what is added to scaled codes.

    Raises:
        UserError: if no whole numbers do.
    """
    zero = (-added / scale).nan_to_num().round().clamp(0, fmt.max)
    if not added.equal(-zero * scale):
        raise UserError(
            "its zero points are not whole numbers, and those of packed layers are: read a "
            "checkpoint in int4, int8 or a float dtype"
        )
    return Affine(scale, zero)


def read_values(
    stored: StoredLayer, dtype: torch.dtype
) -> tuple[Float[Tensor, "b w"], Float[Tensor, "b 1"], Float[Tensor, "b 1"] | None]:
    """Return the values of codes, the scales, and what is added, if the model is in `dtype`."""
    scale = read_scale(stored, "scale")
    values = read_points(stored).view(len(scale), -1)
    zero = None
    if "zero_point" in stored.tensors:
        zero = read_scale(stored, "zero_point").to(dtype).float()
    return values, scale.to(dtype).float(), zero


def check_fused(stored: StoredLayer, dtype: torch.dtype) -> None:
    """Check that fused products and sums, as of compiled kernels, give the same weight.

    Raises:
        UserError: if they do not.
    """
    values, scale, zero = read_values(stored, dtype)
    if zero is None:
        return
    fused = (values.double() * scale.double() + zero.double()).float()
    if not fused.equal(values * scale + zero):
        raise UserError(INEXACT_ZEROS)


def find_settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a weight: those of the config, and those for its name.

    Raises:
        UserError: if the config is not understood.
    """
    settings = dict(config)
    for pattern, own in config.get("modules_quant_config", {}).items():
        if matches(name, pattern):
            settings |= own
            break
    for weights_dtype, patterns in config.get("modules_dtype_dict", {}).items():
        if any(matches(name, pattern) for pattern in patterns):
            return settings | {"weights_dtype": weights_dtype}
    return settings


def matches(name: str, pattern: str) -> bool:
    """Return whether a pattern of SDNQ means the weight of this name."""
    if pattern.startswith("."):
        return name.startswith(pattern[1:])
    in_name = pattern in name.split(".")
    return name == pattern or in_name or ("*" in pattern and fnmatchcase(name, f"{pattern}*"))
