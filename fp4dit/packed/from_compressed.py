"""What a checkpoint of compressed-tensors holds, as a packed transformer of ours."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fp4dit.clock import Clock
from fp4dit.errors import UserError
from fp4dit.packed.compressed import FORMATS, MXFP4, MXFP4_INPUTS
from fp4dit.packed.description import described, fill, found
from fp4dit.packed.folders import described_by, new, saved_dtype, transformer
from fp4dit.packed.hub import attach
from fp4dit.packed.interchange import filled
from fp4dit.packed.layer import PackedLinear
from fp4dit.policy import Rule
from fp4dit.tensors import as_os_errors

PARTS = ("weight_packed", "weight_scale", "weight_global_scale")
BESIDES = ("transform_config", "sparsity_config", "kv_cache_scheme")


def packed_(model: ModelMixin, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Put what a compressed-tensors checkpoint holds into a plain model, in place, so that it saves itself as ours. The
    model may be on the meta device.

    Raises:
        UserError: if there is a layer or an input that is not representable; the message names it.
    """
    if more := [key for key in BESIDES if config.get(key)]:
        raise UserError(f"the checkpoint has a {more[0]}, which has no counterpart here")
    rest, rules, made = dict(state), {}, {}
    for name in [name.removesuffix(".weight_packed") for name in state if name.endswith(".weight_packed")]:
        group = group_of(name, config)
        kept = {part: rest.pop(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in rest}
        made[name] = layer = read(name, kept, group["format"] or config.get("format"), model)
        model.set_submodule(name, layer)
        rest |= {f"{name}.{part}": value for part, value in layer.held.items()}
        if group["output_activations"] is not None:
            raise UserError(f"the output of {name} is quantized, which has no counterpart here")
        if group["input_activations"] is not None:
            rules[name] = input_rule(name, group["input_activations"])
    try:
        model.load_state_dict(rest, assign=True)
    except RuntimeError as error:
        raise UserError(f"the checkpoint is not of {type(model).__name__}: {error}") from error
    description = described(made, dict.fromkeys(made, Rule("*", None)), rules)
    fill(model, description.inputs, Clock())
    attach(model, description)


def group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The group that the layer is of: by name, by a pattern, or as one of all linear layers."""
    fields = {"format": None, "input_activations": None, "output_activations": None, "targets": ()}
    for group in ({**fields, **group} for group in config.get("config_groups", {}).values()):
        for target in group["targets"]:
            if target in (name, "Linear") or (target.startswith("re:") and re.match(target[3:], name)):
                return group
    raise UserError(f"{name} is packed, and no group of the config names it")


def read(name: str, kept: Mapping[str, Tensor], called: str | None, model: nn.Module) -> PackedLinear:
    fmt = next((fmt for fmt in FORMATS if fmt.name == called), None)
    if fmt is None:
        raise UserError(f"{name} is {called}, and only {' and '.join(fmt.name for fmt in FORMATS)} are read")
    source = found(model, name)
    if not isinstance(source, nn.Linear):
        raise UserError(f"{name} is no linear layer of {type(model).__name__}: the checkpoint is of another model")
    try:
        layout, held = fmt.read(kept)
        return filled(source, layout, held, "cpu")
    except KeyError as error:
        raise UserError(f"{name} lacks {error.args[0]}: copy all files of the checkpoint") from error
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def input_rule(name: str, scheme: Mapping[str, Any]) -> Rule:
    theirs = {key: value for key, value in scheme.items() if value is not None}
    if theirs != MXFP4().arguments(dynamic=True):
        raise UserError(
            f"the input of {name} is quantized as {dict(scheme)}, which no rule here does to the bit: set "
            "input_activations to null in the config to convert the weights alone"
        )
    return Rule(name, MXFP4_INPUTS)


def convert(path: str, out: str) -> Sequence[str]:
    """Write the transformer into a new folder, as ours; what a person must know of it.

    Raises:
        UserError: as `packed_`, or if there is no such transformer.
    """
    folder, target = transformer(path, "compressed-tensors"), new(out)
    config = described_by(folder)
    theirs = config.pop("quantization_config")
    kind = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise UserError(f"{config['_class_name']} in {folder}/config.json is no model of diffusers")
    with init_empty_weights():
        model = kind.from_config(config).to(saved_dtype(folder))  # pyright: ignore[reportAttributeAccessIssue]
    packed_(model, loaded(folder), theirs)
    with as_os_errors(target):
        model.save_pretrained(target)
    return [f"after `import fp4dit`, diffusers.{kind.__name__}.from_pretrained({str(out)!r}) loads it"]


def loaded(folder: Path) -> dict[str, Tensor]:
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            state |= load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from error
    return state
