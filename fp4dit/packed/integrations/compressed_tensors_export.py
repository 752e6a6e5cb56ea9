"""Export a packed transformer to compressed-tensors: the tensors, their names and the config."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from diffusers import AutoModel
from torch import Tensor, nn

from fp4dit.packed.integrations.compressed_tensors import FORMATS, CompressedFormat
from fp4dit.packed.integrations.folders import (
    find_transformer,
    read_config,
    read_saved_dtype,
    require_new_folder,
)
from fp4dit.packed.model import uncastable_state_keys
from fp4dit.packed.nn.linear import PackedConv, PackedLinear
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.rules import find_layers
from fp4dit.quantization.timestep_ranges import base_layer_name
from fp4dit.utils.errors import UserError
from fp4dit.utils.safetensors_io import save_tensors

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

MAX_NAMES_SHOWN = 20  # layer names in one line

COMPUTE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class CompressedModel:
    """Tensors and `quantization_config` for readers of compressed-tensors.

    `notes` tell the user what is exact, and what is lost.
    """

    state: Mapping[str, Tensor]
    config: Mapping[str, Any]
    notes: Sequence[str]


def export_compressed_tensors(
    path: str, out: str, dense: Sequence[str] = (), dtype: str | None = None
) -> Sequence[str]:
    """Write the transformer of an exported pipeline into a new folder.

    Args:
        path: the folder of the pipeline or of the transformer.
        out: the new folder.
        dense: patterns of layers to write as plain weights.
        dtype: the dtype in which weights are bit-exact, and of everything that is not packed. None
            is the dtype of the files.

    Returns:
        Notes for the user.

    Raises:
        UserError: if there is no such pipeline, or if a layer cannot be converted.
    """
    if dtype not in (None, *COMPUTE_DTYPES):
        raise UserError(f"dtype={dtype}: choose {', '.join(COMPUTE_DTYPES)}")
    folder, target = find_transformer(path, "fp4dit"), require_new_folder(out)
    torch_dtype = COMPUTE_DTYPES[dtype] if dtype else read_saved_dtype(folder)
    model: Any = AutoModel.from_pretrained(str(folder), torch_dtype=torch_dtype)
    compressed = compress_model(model, dense)
    target.mkdir(parents=True, exist_ok=True)
    save_tensors(compressed.state, target / WEIGHTS_FILE, {"format": "pt"})
    config = read_config(folder) | {"quantization_config": compressed.config}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return [
        *compressed.notes,
        "vLLM and compressed-tensors read it, and diffusers does not; the rest of the pipeline is "
        "as it was",
    ]


def compress_model(model: nn.Module, dense: Sequence[str] = ()) -> CompressedModel:
    """Convert a packed model. Its weights are bit-exact in the model's dtype.

    Args:
        dense: patterns of layers to write as plain weights, which are exact and take more space.

    Raises:
        UserError: if a layer cannot be converted. The message names the layer and the reason.
    """
    state = list_unpacked_tensors(model)
    groups: dict[str, dict[str, Any]] = {}
    refused: dict[str, list[str]] = {}
    packed = list_packed_layers(model)
    for name, layer in packed.items():
        if any(fnmatchcase(name, pattern) for pattern in dense):
            state[f"{name}.weight"] = dequantize_weight(name, layer)
            continue
        try:
            fmt, tensors = encode_layer(layer)
        except UserError as error:
            refused.setdefault(str(error), []).append(name)
            continue
        for suffix, value in tensors.items():
            state[f"{name}.{suffix}"] = value
        scheme = make_scheme(fmt, layer)
        group = groups.setdefault(json.dumps(scheme), {"targets": [], **scheme})
        group["targets"].append(name)
    if refused:
        raise UserError(explain_refusals(refused))
    if not groups:
        raise UserError(
            "no packed layer is left: give a folder that targets=[export] made, and name fewer in "
            "dense"
        )
    notes = list(describe_conversion(model, packed, groups))
    state = {name: value.contiguous() for name, value in state.items()}
    config = build_quantization_config(groups, list_ignored_layers(model, groups))
    return CompressedModel(state, config, notes)


def list_unpacked_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a packed model that are not part of its quantization, by name."""
    quantized = uncastable_state_keys(model)
    tensors = {}
    for name, value in model.state_dict().items():
        if name not in quantized:
            tensors[state_key_without_wrapper(name, model)] = value
    return tensors


def list_packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of a model, by name.

    Raises:
        UserError: if a layer belongs to a range of timesteps.
    """
    packed = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, PackedLinear):
            continue
        if base_layer_name(name) != name:
            raise UserError(
                f"{name} is for one range of timesteps, and no other format has several layers for "
                "one"
            )
        packed[name] = layer
    return packed


def state_key_without_wrapper(name: str, model: nn.Module) -> str:
    """Return a state key without the wrapper of norms whose input is quantized.

    A quantizer before a norm of q or k makes `nn.Sequential(quantizer, norm)` of the norm.
    """
    owner, _, rest = name.rpartition(".1.")
    if not owner:
        return name
    module = model.get_submodule(owner)
    is_wrapper = isinstance(module, nn.Sequential) and isinstance(module[0], FakeQuantize)
    return f"{owner}.{rest}" if is_wrapper else name


def dequantize_weight(name: str, layer: PackedLinear) -> Tensor:
    """Return the weight of a layer in its dtype, with the shape that the plain layer has.

    Raises:
        UserError: if the layer transforms its input.
    """
    if layer.transform_chain:
        raise UserError(
            f"{name} transforms its input, so its weight alone is not the layer: it cannot be "
            "converted"
        )
    weight = layer.dequantize(layer.dtype)
    if isinstance(layer, PackedConv):
        return weight.unflatten(1, (-1, *layer.geometry.kernel_size))
    return weight


def encode_layer(layer: PackedLinear) -> tuple[CompressedFormat, dict[str, Tensor]]:
    """Encode a layer in the first format that can represent it.

    Raises:
        UserError: if no format can. The message has the reason for each.
    """
    reasons = []
    for fmt in FORMATS:
        try:
            return fmt, fmt.encode(layer)
        except UserError as error:
            reasons.append(f"it cannot be {fmt.name}, because {error}")
    raise UserError("; ".join(reasons))


def make_scheme(fmt: CompressedFormat, layer: PackedLinear) -> dict[str, Any]:
    """Return the part of a config group that says how a layer is quantized."""
    return {
        "format": fmt.name,
        "weights": fmt.weight_args,
        "input_activations": fmt.describe_input(layer.input_fake_quant),
    }


def list_ignored_layers(model: nn.Module, groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the names of the layers that no group of the config targets."""
    targets: set[str] = set()
    for group in groups.values():
        targets.update(group["targets"])
    return [name for name in find_layers(model) if name not in targets]


def build_quantization_config(
    groups: Mapping[str, Mapping[str, Any]], ignored: Sequence[str]
) -> dict[str, Any]:
    """Build the `quantization_config` of config.json.

    If all layers are alike, one group targets all linear layers; else each group lists its layers.
    """
    formats = list(dict.fromkeys(group["format"] for group in groups.values()))
    config_groups = {}
    for i, group in enumerate(groups.values()):
        targets = ["Linear"] if len(groups) == 1 else group["targets"]
        config_groups[f"group_{i}"] = {**group, "targets": targets, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "config_groups": config_groups,
        "ignore": list(ignored),
    }


def describe_conversion(
    model: nn.Module, packed: Mapping[str, PackedLinear], groups: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield notes on a converted transformer: what is exact, and what is lost.

    Args:
        packed: the packed layers of the model, by name.
        groups: the groups of the compressed-tensors config.
    """
    yield from count_layers_by_format(packed, groups)
    quantized, described = set(), set()
    for name, layer in packed.items():
        if isinstance(layer.input_fake_quant, FakeQuantize):
            quantized.add(name)
    for group in groups.values():
        if group["input_activations"]:
            described.update(group["targets"])
    if described:
        yield (
            f"the inputs of {len(described)} layers are described, and quantized bit-exactly as "
            "here"
        )
    if quantized - described:
        yield (
            f"the inputs of {len(quantized - described)} layers are quantized here, in a way that "
            "compressed-tensors cannot describe: its readers leave them as they are"
        )
    if any(layer.dtype == torch.float32 for layer in packed.values()):
        yield "the model is of float32, and compressed-tensors itself reads weights as bfloat16"
    layer_inputs = {id(layer.input_fake_quant) for layer in packed.values()}
    for module in model.modules():
        if isinstance(module, FakeQuantize) and id(module) not in layer_inputs:
            yield "the operands of attention are quantized here, and not by readers of this folder"
            return


def count_layers_by_format(
    packed: Mapping[str, PackedLinear], groups: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield a note on the layers of each format."""
    for fmt in FORMATS:
        names: list[str] = []
        for group in groups.values():
            if group["format"] == fmt.name:
                names.extend(group["targets"])
        if names:
            dtype = packed[names[0]].dtype
            yield f"{len(names)} layers are {fmt.name}, with weights that are bit-exact in {dtype}"


def explain_refusals(refused: Mapping[str, Sequence[str]]) -> str:
    """Return the message for all refused layers, by reason.

    All of them are listed at once, so that the user can name them in `dense` at once.
    """
    lines = [f"{format_names(names)}: {reason}" for reason, names in refused.items()]
    lines.append(
        "Choose another dtype, or name the layers that do not transform their input in dense"
    )
    return "\n".join(lines)


def format_names(names: Sequence[str]) -> str:
    """Return names separated by commas, shortened if there are many."""
    shown = ", ".join(names[:MAX_NAMES_SHOWN])
    rest = len(names) - MAX_NAMES_SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown
