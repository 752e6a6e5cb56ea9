"""GGUF, the file format of llama.cpp: INT4 and INT8 in blocks of 32 with fp16 scales.

A block of Q4_0 is d (q - 8), of Q4_1 d q + m, and of Q8_0 d q. The low half of byte i of a block of
4-bit codes is code i, and the high half code i + 16. The package `gguf` multiplies in fp32, and
diffusers in fp16, so that products with more than 11 bits are rounded. Weights are written only if
both are exact. GGUF has MXFP4 too, which diffusers does not read.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from fp4dit.numerics.formats import integer
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import StoredLayer, StoredModel
from fp4dit.packed.targets.folders import read_config
from fp4dit.packed.targets.gguf_file import GGUFTensor, read_gguf, write_gguf
from fp4dit.packed.targets.grid import (
    PLAIN,
    GridWeight,
    make_integer_grid,
    matrix_shape,
    read_grid,
    read_integers,
    require_scale,
)
from fp4dit.packed.targets.single_files import SingleFileTarget
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.errors import UserError

BLOCK = 32

# What a block consists of: the fp16 numbers before its codes.
NUMBERS = {"Q4_0": ("scale",), "Q4_1": ("scale", "least"), "Q8_0": ("scale",)}

INEXACT_ZEROS = (
    "its zero points times its scales are not numbers of fp16: use weight.format=int4 and "
    "weight.scale.rule=absmax"
)


@dataclass(frozen=True)
class GGUF(SingleFileTarget):
    """INT4 as Q4_0 or Q4_1, and INT8 as Q8_0. A scale of more than 32 values is repeated.

    Example:
        >>> GGUF().store(packed_layer, (24, 128), torch.float16).settings
        {'type': 'Q4_0'}
    """

    name: ClassVar[str] = "gguf"
    packages: ClassVar[str] = "diffusers 'gguf>=0.10.0'"
    file_name: ClassVar[str] = "diffusion_pytorch_model.gguf"
    config_class: ClassVar[str] = "GGUFQuantizationConfig"

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        grid = read_grid(layer)
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {PLAIN}")
        if grid.width % BLOCK:
            raise UserError(
                f"{grid.width} values share a scale, which is no multiple of {BLOCK}: use "
                f"weight.granularity.size={BLOCK}, or {PLAIN}"
            )
        repeats = grid.width // BLOCK
        if grid.fmt == integer(8):
            points = grid.points.view(-1, BLOCK)
            scale = require_scale(grid).repeat_interleave(repeats, 0)
            scale = scale.where(points.any(1, keepdim=True), 1.0)  # rules give zeros a tiny scale
            return make_layer(shape, "Q8_0", (scale,), points.to(torch.int8).view(torch.uint8))
        points, qparams = read_integers(grid, 4)
        scale, zero = (x.repeat_interleave(repeats, 0) for x in (qparams.scale, qparams.zero))
        scale = scale.where((points.view(-1, BLOCK) != zero).any(1, keepdim=True), 1.0)
        low, high = points.view(-1, BLOCK).to(torch.uint8).chunk(2, 1)
        codes = low | high << 4
        if (zero == 8).all():
            return make_layer(shape, "Q4_0", (scale,), codes)
        return make_layer(shape, "Q4_1", (scale, -zero * scale), codes)

    def decode(self, stored: StoredLayer) -> GridWeight:
        numbers, points = split_blocks(stored)
        scale, shape = numbers[0].float(), matrix_shape(stored.shape)
        kind, rows = stored.settings["type"], shape[0]
        bits = 8 if kind == "Q8_0" else 4
        zero = torch.full_like(scale, 2 ** (bits - 1))
        if kind == "Q4_1":
            zero = (-numbers[1].float() / scale).nan_to_num().round().clamp(0, 15)
        else:
            points = points + 2 ** (bits - 1)
        return make_integer_grid(
            points.view(shape), scale.view(rows, -1), zero.view(rows, -1), bits
        )

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        numbers, points = split_blocks(stored)
        weight = numbers[0] * points.half()
        if len(numbers) > 1:
            weight = weight + numbers[1]
        return weight.view(matrix_shape(stored.shape)).to(dtype)

    def read_weight(self, stored: StoredLayer) -> Float[Tensor, "o k"]:
        numbers, points = split_blocks(stored)
        weight = numbers[0].float() * points
        if len(numbers) > 1:
            weight = weight + numbers[1].float()
        return weight.view(matrix_shape(stored.shape))

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        if stored.settings["type"] == "Q4_1":
            return INEXACT_ZEROS
        fits = "export_format.dtype=float16"
        if stored.settings["type"] == "Q4_0":
            fits += ", or weight.scale.dtype=bf16"
        return (
            f"diffusers multiplies scales and codes in fp16, and rounds the weight otherwise than "
            f"{dtype}: use {fits}"
        )

    def describe(self, stored: StoredLayer) -> str:
        return stored.settings["type"]

    def write(self, model: StoredModel, folder: Path) -> None:
        plain = "F16" if model.dtype == torch.float16 else "F32"
        tensors = {}
        for name, value in model.others.items():
            kept = value.half() if plain == "F16" else value.float()
            tensors[name] = GGUFTensor(plain, kept)
        for name, layer in model.layers.items():
            kind = layer.settings["type"]
            tensors[f"{name}.weight"] = GGUFTensor(kind, layer.tensors["weight"])
        text = json.dumps(model.config, indent=2)
        (folder / "config.json").write_text(text + "\n")
        write_gguf(tensors, json.loads(text), folder / self.file_name)

    def reads(self, folder: Path) -> bool:
        return len(list(folder.glob("*.gguf"))) == 1

    def read(self, folder: Path, skeleton: nn.Module) -> StoredModel:
        (path,) = folder.glob("*.gguf")
        config = read_config(folder)
        tensors, layers = read_gguf(path, config), {}
        for name, source in find_layers(skeleton).items():
            tensor = tensors.get(f"{name}.weight")
            if tensor is None or tensor.kind not in NUMBERS:
                continue
            shape = tuple(source.weight.shape)  # pyright: ignore[reportCallIssue, reportArgumentType]
            layers[name] = StoredLayer(shape, {"weight": tensor.data}, {"type": tensor.kind})
            del tensors[f"{name}.weight"]
        others = {name: tensor.data for name, tensor in tensors.items()}
        dtypes = {value.dtype for value in others.values()}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        left = [name for name in find_layers(skeleton) if name not in layers]
        others = {name: value.to(dtype) for name, value in others.items()}
        return StoredModel(config, dtype, layers, others, left)


def make_layer(
    shape: tuple[int, ...],
    kind: str,
    numbers: tuple[Float[Tensor, "blocks 1"], ...],
    codes: UInt8[Tensor, "blocks b"],
) -> StoredLayer:
    """Return a layer of blocks that consist of fp16 numbers and codes.

    Raises:
        UserError: if a number is not one of fp16.
    """
    parts = []
    for number in numbers:
        half = number.half()
        if not half.float().equal(number.float()):
            if number is not numbers[0]:
                raise UserError(INEXACT_ZEROS)
            raise UserError("its scales are not numbers of fp16: use weight.scale.dtype=fp16")
        parts.append(half.contiguous().view(torch.uint8))
    blocks = torch.cat([*parts, codes], 1).cpu()
    return StoredLayer(shape, {"weight": blocks.view(shape[0], -1)}, {"type": kind})


def split_blocks(
    stored: StoredLayer,
) -> tuple[list[Float[Tensor, "blocks 1"]], Float[Tensor, "blocks 32"]]:
    """Return the fp16 numbers of a layer's blocks, and what the codes mean before these.

    Raises:
        UserError: if there are not as many blocks as the layer has.
    """
    kind, data = stored.settings["type"], stored.tensors["weight"]
    rows, k = matrix_shape(stored.shape)
    head = 2 * len(NUMBERS[kind])
    size = head + (BLOCK if kind == "Q8_0" else BLOCK // 2)
    if tuple(data.shape) != (rows, k // BLOCK * size) or k % BLOCK:
        raise UserError(f"there are {list(data.shape)} bytes for a weight {list(stored.shape)}")
    blocks = data.reshape(-1, size)
    numbers = [blocks[:, i : i + 2].contiguous().view(torch.float16) for i in range(0, head, 2)]
    codes = blocks[:, head:].contiguous()
    if kind == "Q8_0":
        return numbers, codes.view(torch.int8).float()
    unsigned = torch.cat([codes & 15, codes >> 4], 1).float()
    return numbers, unsigned - 8 if kind == "Q4_0" else unsigned
