"""auto-round: INT4 and INT8 in the packing of GPTQ, which diffusers loads through `auto_round`.

A weight of o rows and k columns is stored as its transpose: `qweight` holds codes of consecutive
inputs in 32-bit words, the first in the lowest bits, `qzeros` zero points of consecutive outputs,
and `scales` a number for each group and output. Readers multiply scales and codes in the dtype that
the model is loaded in, which is fp16 or bf16. The format was read from auto-round 0.16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.config_files import ConfigTarget
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_integer_grid,
    matrix_shape,
    read_grid,
    read_integers,
    require_width,
)
from fp4dit.utils.bitpack import pack_bits, unpack_bits
from fp4dit.utils.errors import UserError

WORD = 32  # bits; readers take layers with multiples of 32 inputs and outputs

PACKING = "auto_round"

# What is added to stored zero points, by the name of the packing.
ZERO_OFFSETS = {PACKING: 0, "auto_round:gptqmodel": 0, "auto_round:auto_gptq": 1}

TENSOR_NAMES = {"qweight", "qzeros", "scales"}


@dataclass(frozen=True)
class AutoRound(ConfigTarget):
    """INT4 and INT8, symmetric and with zero points, in groups of 32, 64, 128 and so on.

    Example:
        >>> AutoRound().store(packed_layer, (32, 128), torch.float16).settings
        {'bits': 4, 'group_size': 128, 'sym': True}
    """

    name: ClassVar[str] = "auto_round"
    packages: ClassVar[str] = "diffusers 'auto-round>=0.13.0'"
    quant_method: ClassVar[str] = "auto-round"

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {PLAIN}")
        if layer.dtype == torch.float32:
            raise UserError(
                "auto-round computes in 16 bits: use export_format.dtype=float16 or bfloat16"
            )
        rows, k = matrix_shape(shape)
        if rows % WORD or k % WORD:
            raise UserError(f"its inputs and outputs are not multiples of {WORD}: {PLAIN}")
        grid = read_grid(layer)
        if grid.width != k:
            require_width(grid, [size for size in (128, 64, 32, 256) if k % size == 0])
        bits = 8 if grid.fmt.bits == 8 else 4
        points, qparams = read_integers(grid, bits)
        zero = grid.by_row(qparams.zero)
        tensors = {
            "qweight": pack_words(points.T, bits, 0),
            "qzeros": pack_words(zero.T, bits, 1),
            "scales": grid.by_row(qparams.scale).T.to(layer.dtype),
        }
        settings = {
            "bits": bits,
            "group_size": -1 if grid.width == k else grid.width,
            "sym": bool((zero == 2 ** (bits - 1)).all()),
        }
        return StoredLayer(shape, {name: x.cpu() for name, x in tensors.items()}, settings)

    def decode(self, stored: StoredLayer) -> GridWeight:
        points, zero = read_codes(stored)
        scale = stored.tensors["scales"].T
        return make_integer_grid(points, scale, zero, stored.settings["bits"])

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        points, zero = read_codes(stored)
        scale, width = stored.tensors["scales"].T.to(dtype), points.shape[1] // zero.shape[1]
        difference = points - zero.repeat_interleave(width, 1)
        return scale.repeat_interleave(width, 1) * difference.to(dtype)

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        fmt = "bf16" if dtype == torch.bfloat16 else "fp16"
        return (
            f"its scales are not numbers of {dtype}, in which readers have them: use "
            f"weight.scale.dtype={fmt}, or another export_format.dtype"
        )

    def describe(self, stored: StoredLayer) -> str:
        size = stored.settings["group_size"]
        kind = "symmetric" if stored.settings["sym"] else "asymmetric"
        where = "rows" if size < 0 else f"groups of {size}"
        return f"{kind} int{stored.settings['bits']} in {where}"

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        kinds = [dict(layer.settings) for layer in model.layers.values()]
        common = max(kinds, key=kinds.count)
        others: dict[str, Any] = {name: {"bits": 16, "data_type": "float"} for name in model.left}
        for name, layer in model.layers.items():
            if layer.settings != common:
                others[name] = dict(layer.settings)
        return {
            **common,
            "data_type": "int",
            "packing_format": PACKING,
            "block_name_to_quantize": list(model.layers),
            "extra_config": others,
        }

    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        if "qweight" not in tensors:
            return None
        if tensors.keys() != TENSOR_NAMES:
            raise UserError(f"{name} has the tensors {', '.join(tensors)}, which are not read")
        packing = config.get("packing_format")
        if packing not in ZERO_OFFSETS:
            names = ", ".join(ZERO_OFFSETS)
            raise UserError(f"the checkpoint has the packing {packing}, and only {names} are read")
        settings = {**config, **config.get("extra_config", {}).get(name, {})}
        if settings.get("data_type", "int") != "int" or settings.get("bits") not in (4, 8):
            raise UserError(f"{name} is not int4 or int8, and only these are read")
        read = {key: settings.get(key) for key in ("bits", "group_size", "sym")}
        return {**read, "zero_offset": ZERO_OFFSETS[packing]}


def pack_words(codes: Float[Tensor, "n m"], bits: int, dim: int) -> Tensor:
    """Pack codes of consecutive places along a dimension into 32-bit words."""
    rows = codes.movedim(dim, -1).contiguous()
    packed = pack_bits(rows.to(torch.uint8), bits).view(torch.int32)
    return packed.movedim(-1, dim).contiguous()


def unpack_words(words: Tensor, bits: int, dim: int) -> Float[Tensor, "n m"]:
    """Undo `pack_words`."""
    packed = words.movedim(dim, -1).contiguous().view(torch.uint8)
    codes = unpack_bits(packed, bits, packed.shape[-1] * 8 // bits)
    return codes.float().movedim(-1, dim)


def read_codes(stored: StoredLayer) -> tuple[Float[Tensor, "o k"], Float[Tensor, "o n"]]:
    """Return the codes of a layer, and its zero points.

    Raises:
        UserError: if the tensors do not have the dtypes and shapes of such a layer.
    """
    (rows, k), bits = stored.shape, stored.settings["bits"]
    qweight, qzeros, scales = (stored.tensors[name] for name in ("qweight", "qzeros", "scales"))
    groups, per_word = len(scales), WORD // bits
    shapes = [list(x.shape) for x in (qweight, qzeros, scales)]
    expected = [[k // per_word, rows], [groups, rows // per_word], [groups, rows]]
    if (
        shapes != expected
        or k % max(groups, 1)
        or (qweight.dtype, qzeros.dtype)
        != (
            torch.int32,
            torch.int32,
        )
    ):
        raise UserError(
            f"its tensors have the shapes {shapes}, which do not fit a weight {[rows, k]}"
        )
    zero = unpack_words(qzeros, bits, 1).T + stored.settings.get("zero_offset", 0)
    return unpack_words(qweight, bits, 0).T, zero
