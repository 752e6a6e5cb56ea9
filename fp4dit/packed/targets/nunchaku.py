"""Nunchaku Lite: SVDQuant and AWQ layers, which diffusers 0.42 loads with Nunchaku's kernels.

A layer of SVDQuant (`svdq_w4a4`) is x -> Q(x / smooth) W^T + x proj_down proj_up^T + bias, with W
in INT4 in groups of 64, or in NVFP4. A layer of AWQ (`awq_w4a16`) is INT4 in groups of 64 with zero
points, and its input stays in 16 bits. The tensors are in the order that `nunchaku_layout` says.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.numerics.formats import integer
from fp4dit.packed.nn.linear import PackedLinear
from fp4dit.packed.targets.base import FittedTransform, StoredLayer, StoredModel
from fp4dit.packed.targets.config_files import ConfigTarget
from fp4dit.packed.targets.grid import PLAIN, GridWeight, matrix_shape, read_grid
from fp4dit.packed.targets.nunchaku_branch import encode_transforms, restore_transforms
from fp4dit.packed.targets.nunchaku_layout import TILE, scale_tiling
from fp4dit.packed.targets.nunchaku_weights import (
    AWQ,
    SVDQ,
    decode_awq,
    decode_svdq,
    dequantize_awq,
    encode_awq,
    encode_svdq,
    list_shapes,
)
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.utils.errors import UserError

IN_16_BITS = "+weight.ignore=[...] leaves it in 16 bits"


@dataclass(frozen=True)
class NunchakuLite(ConfigTarget):
    """INT4 in groups of 64 and NVFP4, with smoothing and low-rank branches, and AWQ.

    Layers are stored as AWQ if they are INT4, their inputs are not quantized, and they have no
    transform. All others are stored as SVDQuant.

    Args:
        rank: The rank of all branches, a multiple of 16. Smaller ones are filled with zeros.

    Example:
        >>> NunchakuLite().store(packed_layer, (128, 256), torch.bfloat16).settings
        {'kind': 'svdq_w4a4', 'precision': 'int4', 'group_size': 64, 'rank': 32}
    """

    rank: int = 32

    name: ClassVar[str] = "nunchaku_lite"
    packages: ClassVar[str] = "'diffusers>=0.42' kernels"
    quant_method: ClassVar[str] = "nunchaku_lite"
    holds_transforms: ClassVar[bool] = True
    inputs_note: ClassVar[str] = (
        "its readers quantize those of SVDQuant layers, smoothed, by token in groups of 64 (INT4) "
        "or 16 (NVFP4), and leave those of AWQ layers in 16 bits"
    )

    def encode(self, layer: PackedLinear, shape: tuple[int, ...]) -> StoredLayer:
        advice = IN_16_BITS if layer.transform_chain else PLAIN
        if len(shape) > 2:
            raise UserError(f"it is a convolution, and only linear layers can be: {advice}")
        rows, k = matrix_shape(shape)
        if rows % TILE or k % TILE:
            raise UserError(f"its inputs and outputs are not multiples of {TILE}: {advice}")
        if layer.dtype == torch.float32:
            raise UserError(
                "Nunchaku computes in 16 bits: use export_format.dtype=bfloat16 or float16"
            )
        grid = read_grid(layer, with_transforms=True)
        is_quantized = isinstance(layer.input_fake_quant, FakeQuantize)
        if grid.fmt in (integer(4), integer(4, signed=False)) and not (
            is_quantized or layer.transform_chain
        ):
            return StoredLayer(shape, encode_awq(grid, layer.dtype), dict(AWQ))
        precision, tensors = encode_svdq(grid, layer.dtype)
        tensors |= encode_transforms(layer.transform_chain, (rows, k), self.rank, layer.dtype)
        return StoredLayer(shape, tensors, SVDQ[precision] | {"rank": self.rank})

    def decode(self, stored: StoredLayer) -> GridWeight:
        check_tensors(stored)
        return decode_awq(stored) if stored.settings["kind"] == AWQ["kind"] else decode_svdq(stored)

    def dequantize(self, stored: StoredLayer, dtype: torch.dtype) -> Float[Tensor, "o k"]:
        if stored.settings["kind"] == AWQ["kind"]:
            check_tensors(stored)
            return dequantize_awq(stored).to(dtype)
        return self.decode(stored).dequantize().to(dtype)

    def restore_transforms(self, stored: StoredLayer) -> Sequence[FittedTransform]:
        if stored.settings["kind"] == AWQ["kind"]:
            return ()
        return restore_transforms(stored)

    def explain_difference(self, stored: StoredLayer, dtype: torch.dtype) -> str:
        fmt = "bf16" if dtype == torch.bfloat16 else "fp16"
        if stored.settings["kind"] == AWQ["kind"]:
            return (
                f"its scales, or its zero points times its scales, are not numbers of {dtype}: use "
                f"weight.scale.dtype={fmt} and weight.format=int4, weight.scale.rule=absmax"
            )
        return f"its scales are not numbers of {dtype}: use weight.scale.dtype={fmt}"

    def describe(self, stored: StoredLayer) -> str:
        if stored.settings["kind"] == AWQ["kind"]:
            return "INT4 in groups of 64 (AWQ)"
        precision, rank = stored.settings["precision"].upper(), stored.settings["rank"]
        return f"{precision} with a branch of rank {rank} (SVDQuant)"

    def quantizes_input(self, stored: StoredLayer) -> bool:
        return stored.settings["kind"] != AWQ["kind"]

    def check_stored(self, model: StoredModel) -> None:
        precisions = {
            layer.settings["precision"]
            for layer in model.layers.values()
            if layer.settings["kind"] != AWQ["kind"]
        }
        if len(precisions) > 1:
            raise UserError(
                "some layers are INT4 and others NVFP4, and readers take one of the two for all "
                "layers of SVDQuant: use one weight.format"
            )

    def build_config(self, model: StoredModel) -> dict[str, Any]:
        sections: dict[str, dict[str, Any]] = {}
        for name, layer in model.layers.items():
            settings = dict(layer.settings)
            section = sections.setdefault(settings.pop("kind"), {**settings, "targets": []})
            section["targets"].append(name)
        return {"compute_dtype": str(model.dtype).removeprefix("torch."), **sections}

    def build_files(self, model: StoredModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        others = dict(model.others)
        for key in list_biases(model):
            others[key] = scale_tiling(1).arrange(others[key])
        return super().build_files(replace(model, others=others))

    def parse_files(
        self,
        state: Mapping[str, Tensor],
        config: Mapping[str, Any],
        skeleton: nn.Module,
        dtype: torch.dtype,
    ) -> StoredModel:
        model = super().parse_files(state, config, skeleton, dtype)
        others = dict(model.others)
        for key in list_biases(model):
            others[key] = scale_tiling(1).restore(others[key])
        return replace(model, others=others)

    def read_settings(
        self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
    ) -> Mapping[str, Any] | None:
        for kind in ("svdq_w4a4", "awq_w4a16"):
            section = config.get(kind) or {"targets": ()}
            if name in section["targets"]:
                settings = {key: section[key] for key in ("precision", "group_size")}
                known = SVDQ.values() if kind == "svdq_w4a4" else (AWQ,)
                if {"kind": kind, **settings} not in known:
                    raise UserError(f"{name} is {settings} in {kind}, which is not read")
                rank = {"rank": section["rank"]} if kind == "svdq_w4a4" else {}
                return {"kind": kind, **settings, **rank}
        return None

    def write_example(self, class_name: str, pipeline: str | None, dtype: torch.dtype) -> str:
        return (
            "# diffusers needs an NVIDIA GPU (not Hopper; NVFP4: Blackwell), and runs kernels that "
            "it downloads\n# from rootonchair/nunchaku-lite-kernels. If you trust them, set "
            "DIFFUSERS_TRUST_REMOTE_KERNELS=true.\n"
            + super().write_example(class_name, pipeline, dtype)
        )


def check_tensors(stored: StoredLayer) -> None:
    """Raise a UserError if a layer's tensors do not have the dtypes and shapes of such a layer."""
    for name, (shape, dtypes) in list_shapes(stored).items():
        value = stored.tensors[name]
        if tuple(value.shape) != shape or value.dtype not in dtypes:
            raise UserError(
                f"its {name} is {list(value.shape)} of {value.dtype}, and has to be {list(shape)} "
                f"of {' or '.join(map(str, dtypes))}"
            )


def list_biases(model: StoredModel) -> list[str]:
    """Return the names of the biases of SVDQuant layers, whose values are in another order."""
    keys = []
    for name, layer in model.layers.items():
        if layer.settings["kind"] != AWQ["kind"] and f"{name}.bias" in model.others:
            keys.append(f"{name}.bias")
    return keys
