"""A packed transformer as compressed-tensors describes one: the names of its tensors, and the config."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from fp4dit.errors import UserError
from fp4dit.grid import Grid
from fp4dit.packed.compressed import FORMATS, MXFP4, NVFP4
from fp4dit.packed.description import verbatim
from fp4dit.packed.folders import described_by, new, saved_dtype, transformer
from fp4dit.packed.layer import PackedConv, PackedLinear
from fp4dit.packed.remarks import refusal, remarks
from fp4dit.policy import layers
from fp4dit.ranges import whole
from fp4dit.tensors import save_tensors

FILE = "diffusion_pytorch_model.safetensors"
COMPUTED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Compressed:
    """`state` and `quantization_config`, as readers of compressed-tensors find them, and what a person must know."""

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    notes: Sequence[str]


def compressed(model: nn.Module, dense: Sequence[str] = ()) -> Compressed:
    """Of a packed model, with its weights to the bit as its dtype has them.

    Layers with names like `dense` are written as plain weights, which takes more room and changes nothing.

    Raises:
        UserError: if a layer is not representable; the message names it and says why.
    """
    ours = verbatim(model)
    state = {plain(name, model): value for name, value in model.state_dict().items() if name not in ours}
    groups: dict[str, dict[str, Any]] = {}
    refused: dict[str, list[str]] = {}
    packed = {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}
    for name, layer in packed.items():
        if whole(name) != name:
            raise UserError(f"{name} is for one range of timesteps, and no other format has several layers for one")
        if any(fnmatchcase(name, pattern) for pattern in dense):
            state[f"{name}.weight"] = plain_weight(name, layer)
            continue
        try:
            fmt, kept = written(layer)
        except UserError as error:
            refused.setdefault(str(error), []).append(name)
            continue
        state |= {f"{name}.{part}": value for part, value in kept.items()}
        scheme = {"format": fmt.name, "weights": fmt.weights, "input_activations": fmt.inputs(layer.activation)}
        groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})["targets"].append(name)
    if refused:
        raise UserError(refusal(refused))
    converted = {name for group in groups.values() for name in group["targets"]}
    if not converted:
        raise UserError("no packed layer is left: give a folder that targets=[export] made, and name fewer in dense")
    ignored = [name for name in layers(model) if name not in converted]
    notes = list(remarks(model, packed, groups))
    return Compressed({name: value.contiguous() for name, value in state.items()}, config(groups, ignored), notes)


def plain(name: str, model: nn.Module) -> str:
    """A name in the state as the model has it without quantizers before norms of q and k."""
    owner, _, rest = name.rpartition(".1.")
    wrapped = owner and isinstance(module := model.get_submodule(owner), nn.Sequential) and isinstance(module[0], Grid)
    return f"{owner}.{rest}" if wrapped else name


def plain_weight(name: str, layer: PackedLinear) -> Tensor:
    if layer.chain:
        raise UserError(f"{name} transforms its input, so its weight alone is not the layer: it cannot be converted")
    weight = layer.dense(layer.dtype)
    return weight.unflatten(1, (-1, *layer.geometry.kernel_size)) if isinstance(layer, PackedConv) else weight


def written(layer: PackedLinear) -> tuple[NVFP4 | MXFP4, dict[str, Tensor]]:
    """In the first format that takes it."""
    reasons = []
    for fmt in FORMATS:
        try:
            return fmt, fmt.write(layer)
        except UserError as error:
            reasons.append(f"it is no {fmt.name}, for {error}")
    raise UserError("; ".join(reasons))


def config(groups: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]) -> dict[str, Any]:
    """`quantization_config`: one group for all linear layers where they are alike, else groups by name."""
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    alike = [{**group, "targets": ["Linear"]} for group in groups.values()] if len(groups) == 1 else groups.values()
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": {f"group_{i}": {**group, "output_activations": None} for i, group in enumerate(alike)},
        "ignore": list(ignored),
    }


def convert(path: str, out: str, dense: Sequence[str] = (), dtype: str | None = None) -> Sequence[str]:
    """Write the transformer of an exported pipeline into a new folder; what a person must know of it.

    `dtype` is that of what is not packed, and the one in which layers are equal; none is the one in the files.

    Raises:
        UserError: as `compressed`, or if there is no such pipeline.
    """
    if dtype not in (None, *COMPUTED):
        raise UserError(f"dtype={dtype}: choose {', '.join(COMPUTED)}")
    folder, target = transformer(path, "fp4dit"), new(out)
    model: Any = AutoModel.from_pretrained(str(folder), torch_dtype=COMPUTED[dtype] if dtype else saved_dtype(folder))
    made = compressed(model, dense)
    target.mkdir(parents=True, exist_ok=True)
    save_tensors(made.state, target / FILE, {"format": "pt"})
    whole = described_by(folder) | {"quantization_config": made.config}
    (target / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    return [
        *made.notes,
        "vLLM and compressed-tensors read it, and diffusers does not; the rest of the pipeline is as it was",
    ]
