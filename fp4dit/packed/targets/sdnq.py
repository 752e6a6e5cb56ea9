"""SDNQ, the quantization engine of SD.Next, which diffusers loads through the package `sdnq`.

A weight is codes times scales, computed in fp32 and rounded to the dtype of the model. Scales and
zero points are stored in fp32, but diffusers casts them to the dtype that a model is loaded in.
The formats were read from sdnq 0.2.8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.numerics.formats import NumberFormat, integer
from fp4dit.numerics.qparams import Affine, Offset, QParams, Scale
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import FittedTransform, StoredLayer, StoredModel
from fp4dit.packed.targets.config_files import ConfigTarget
from fp4dit.packed.targets.grid import PLAIN, GridWeight, matrix_shape, read_grid
from fp4dit.packed.targets.sdnq_bits import codes_per_group
from fp4dit.packed.targets.sdnq_layout import (
    WEIGHT_DTYPES,
    encode_points,
    grouped_shape,
    read_points,
    read_scale,
    store_codes,
)
from fp4dit.packed.targets.sdnq_transforms import (
    NO_TRANSFORMS,
    TRANSFORM_OPTIONS,
    encode_transforms,
    restore_transforms,
)
from fp4dit.utils.errors import UserError

ALIASES = {
    "fp3": "float3_e1m1fn",
    "fp4": "float4_e2m1fn",
    "fp5": "float5_e2m2fn",
    "fp6": "float6_e3m2fn",
    "fp7": "float7_e3m3fn",
    "fp8": "float8_e4m3fn",
}

UNSUPPORTED_OPTIONS = ("use_codebook", "use_codebook_scale", "scale_dtype")

TENSORS = {"weight", "scale", "zero_point", "svd_up", "svd_down"}

INEXACT_ZEROS = (
    "its zero points times its scales are rounded, so that readers would get another weight: use "
    "weight.scale.dtype=fp16 and export_format.dtype=float32"
)


@dataclass(frozen=True)
class SDNQ(ConfigTarget):
    """Codes of 2 to 8 bits with scales in fp32, one for each row or group, mixed by layer.

    A low-rank branch and some Hadamard rotations are held too (`sdnq_transforms`).

    Example:
        >>> stored = SDNQ().store(packed_layer, (24, 128), torch.float32)
        >>> stored.settings
        {'weights_dtype': 'float4_e2m1fn', 'group_size': 128}
    """

    name: ClassVar[str] = "sdnq"
    packages: ClassVar[str] = "diffusers 'sdnq>=0.2.2'"
    quant_method: ClassVar[str] = "sdnq"
    holds_transforms: ClassVar[bool] = True

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        branch, transforms = encode_transforms(layer.transform_chain)
        grid = read_grid(layer, with_transforms=True)
        weights_dtype, codes = encode_points(grid)
        spatial, n = prod(shape[2:]), grid.blocks_per_row
        if grid.width % spatial or codes.numel() % codes_per_group(int(grid.fmt.bits)):
            raise UserError(f"its groups are not of whole input channels and bytes: {PLAIN}")
        tensors = {"weight": store_codes(codes, weights_dtype, grouped_shape(shape, n))}
        for suffix, value in split_qparams(grid.qparams).items():
            column = grid.by_row(value).cpu()
            tensors[suffix] = column.view(grouped_shape((len(column), n, *[1] * len(shape[2:])), n))
            if shape[2:]:  # a scale for each place of the kernel
                tensors[suffix] = tensors[suffix].expand(*tensors[suffix].shape[:-2], *shape[2:])
        group_size = grid.width // spatial if n > 1 else -1
        settings = {"weights_dtype": weights_dtype, "group_size": group_size, **transforms}
        stored = StoredLayer(shape, tensors | branch, settings)
        if not is_same_fused(stored, layer.dtype):
            raise UserError(INEXACT_ZEROS)
        return stored

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        values, scale, zero = read_values(stored, dtype)
        weight = values * scale if zero is None else values * scale + zero
        return weight.view(matrix_shape(stored.shape)).to(dtype)

    def restore_transforms(self, stored: StoredLayer) -> Sequence[FittedTransform]:
        return restore_transforms(stored)

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
            if isinstance(qparams, Offset) and not is_same_fused(stored, torch.float32):
                raise UserError(
                    "its zero points are not whole numbers, and readers round its products and "
                    "sums together, and packed layers one after the other: read a checkpoint with "
                    "scales of 16 bits, or in int4, int8 or a float dtype"
                )
        elif fmt == integer(fmt.bits) and bool((points < fmt.min).any()):
            # The lowest integer, which the symmetric format lacks.
            middle = 2.0 ** (fmt.bits - 1)
            fmt, points = integer(fmt.bits, signed=False), points + middle
            qparams = Affine(scale, torch.full_like(scale, middle))
        return GridWeight(fmt, points, qparams, k * rows // len(scale))

    def describe(self, stored: StoredLayer) -> str:
        size = stored.settings["group_size"]
        where = "rows" if size < 0 else f"groups of {size}"
        kinds = {"use_hadamard": "rotated", "use_svd": "with a low-rank branch"}
        notes = [note for key, note in kinds.items() if stored.settings.get(key)]
        return " ".join([stored.settings["weights_dtype"], "in", where, *notes])

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        any_transform = any(
            layer.settings.keys() & NO_TRANSFORMS for layer in model.layers.values()
        )
        defaults = NO_TRANSFORMS if any_transform else {}
        kinds = {name: {**defaults, **layer.settings} for name, layer in model.layers.items()}
        common = max(kinds.values(), key=list(kinds.values()).count)
        others = {f"{name}.weight": kind for name, kind in kinds.items() if kind != common}
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
        if not tensors.keys() <= TENSORS:
            raise UserError(f"{name} has the tensors {', '.join(tensors)}, which are not read")
        weights_dtype = settings.get("weights_dtype", "int8")
        weights_dtype = ALIASES.get(weights_dtype, weights_dtype)
        if weights_dtype not in WEIGHT_DTYPES:
            names = ", ".join(WEIGHT_DTYPES)
            raise UserError(f"{name} is {weights_dtype}, and only {names} are read")
        found = {"weights_dtype": weights_dtype, "group_size": settings.get("group_size", 0)}
        return found | {key: settings[key] for key in TRANSFORM_OPTIONS if settings.get(key)}


def split_qparams(qparams: QParams) -> dict[str, Float[Tensor, "blocks 1"]]:
    """Return scales, and what is added to scaled codes, by the names of their tensors.

    Raises:
        UserError: if the qparams are not scales, or scales and zero points.
    """
    if isinstance(qparams, Scale):
        return {"scale": qparams.scale}
    if isinstance(qparams, Affine):
        return {"scale": qparams.scale, "zero_point": -qparams.zero * qparams.scale}
    if isinstance(qparams, Offset):
        return {"scale": qparams.scale, "zero_point": qparams.offset}
    raise UserError(
        f"its blocks have {type(qparams).__name__.lower()} scales: use weight.scale.rule=absmax"
    )


def make_affine(
    scale: Float[Tensor, "blocks 1"], added: Float[Tensor, "blocks 1"], fmt: NumberFormat
) -> Affine | Offset:
    """Return qparams of what is added to scaled codes: whole zero points if they make it."""
    zero = (-added / scale).nan_to_num().round().clamp(0, fmt.max)
    return Affine(scale, zero) if added.equal(-zero * scale) else Offset(scale, added)


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


def is_same_fused(stored: StoredLayer, dtype: torch.dtype) -> bool:
    """Return whether fused products and sums, as of compiled kernels, give the same weight."""
    values, scale, zero = read_values(stored, dtype)
    if zero is None:
        return True
    fused = (values.double() * scale.double() + zero.double()).float()
    return fused.equal(values * scale + zero)


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
