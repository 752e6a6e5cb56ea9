"""Pack the transformer of a quantized pipeline, and quantize and pack its text encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp4dit.packed.integrations import diffusers, transformers
from fp4dit.packed.model import describe_model
from fp4dit.packed.nn.linear import PackedLinear, pack_layers_
from fp4dit.quantization.apply import quantize_weights_
from fp4dit.quantization.audit import LayerAudit, audit_layer, checkpoint_bytes
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.utils.errors import UserError


def pack_transformer_(
    dit: ModelMixin, weight: Mapping[str, Rule], activation: Mapping[str, Rule]
) -> None:
    """Pack a quantized transformer in place, so that `save_pretrained` saves it as packed model.

    Args:
        weight: the rules that quantized its weights, by layer.
        activation: the rules that quantize its activations, by activation.

    Raises:
        UserError: if a weight cannot be packed.
    """
    diffusers.attach_diffusers_config_(dit, describe_model(pack_layers_(dit), weight, activation))


@dataclass(frozen=True)
class TextEncoderReport:
    """Report on a packed text encoder.

    Args:
        name: its name among the components of the pipeline.
        kind: the name of its class.
        layers: the audit of its layers.
        bytes: its size.
        bytes16: its size with all tensors in 16 bits.
        error: the relative error of its last hidden states.
        prompts: the number of prompts that the error is measured on.
    """

    name: str
    kind: str
    layers: Sequence[LayerAudit]
    bytes: int
    bytes16: int
    error: float
    prompts: int


def pack_text_encoder_(
    pipe: DiffusionPipeline, rules: Sequence[Rule], prompts: Sequence[str]
) -> TextEncoderReport:
    """Quantize and pack the largest text encoder of a pipeline, in place.

    Returns:
        A report with the error on `prompts`.

    Raises:
        UserError: see `quantize_text_encoder_`.
    """
    name, encoder = find_largest_encoder(pipe)
    bytes16 = checkpoint_bytes(encoder, [])
    before = compute_hidden_states(pipe, name, prompts)
    layers = quantize_text_encoder_(pipe, rules)
    error = (compute_hidden_states(pipe, name, prompts) - before).norm() / before.norm()
    return TextEncoderReport(
        name=name,
        kind=type(encoder).__name__,
        layers=layers,
        bytes=count_state_bytes(encoder),
        bytes16=bytes16,
        error=error.item(),
        prompts=len(prompts),
    )


def quantize_text_encoder_(pipe: DiffusionPipeline, rules: Sequence[Rule]) -> list[LayerAudit]:
    """Quantize the linear layers in the blocks of a pipeline's largest text encoder, in place.

    Weights are rounded to nearest, and each layer is packed before the next one is touched.
    `save_pretrained` then saves the encoder as packed model.

    Returns:
        The audit of the layers.

    Raises:
        UserError: if there is no text encoder, if a rule matches nothing, needs calibration or does
            not fit a layer, or if nothing would be quantized. Nothing is changed then.
    """
    check_text_encoder_rules(rules)
    _, encoder = find_largest_encoder(pipe)
    names = list_block_layers(encoder)
    rule_of = assign_rules(names, rules)
    audit = []
    for name in names:
        audit.append(audit_layer(name, encoder.get_submodule(name), rule_of.get(name)))
    quantized = {name: rule for name, rule in rule_of.items() if rule.quantizer}
    if not quantized:
        raise UserError(
            "no layer of the text encoder is quantized: give a rule a quantizer, or use "
            "text_encoder=none"
        )
    layers: dict[str, PackedLinear] = {}
    for name, rule in quantized.items():
        quantize_weights_(encoder, {name: rule})[name].prepare().commit_weight()
        layers |= pack_layers_(encoder)
    transformers.attach_transformers_config_(encoder, describe_model(layers, quantized, {}))
    return audit


def check_text_encoder_rules(rules: Sequence[Rule]) -> None:
    """Raise UserError if a rule has something that a text encoder cannot have."""
    for rule in rules:
        if rule.transforms or rule.timestep_boundaries:
            raise UserError(
                f"the text_encoder rule {rule.match!r} has transforms or ranges of timesteps: a "
                "text encoder is not calibrated and has no timesteps, its weights are rounded to "
                "nearest as they are"
            )


def find_largest_encoder(pipe: DiffusionPipeline) -> tuple[str, PreTrainedModel]:
    """Return the text encoder with the most parameters, and its name among the components.

    Raises:
        UserError: if there is no text encoder.
    """
    components: Mapping[str, Any] = pipe.components
    largest, most = None, -1
    for name, component in components.items():
        if not name.startswith("text_encoder") or component is None:
            continue
        parameters = sum(p.numel() for p in component.parameters())
        if parameters > most:
            largest, most = (name, component), parameters
    if largest is None:
        raise UserError(
            f"this {type(pipe).__name__} has no text encoder that could be quantized: use "
            "text_encoder=none"
        )
    return largest


def list_block_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers in lists of blocks.

    Poolers and output projections are not among them.
    """
    names = []
    for name in find_layers(model):
        if any(map(str.isdigit, name.split("."))):
            names.append(name)
    return names


@torch.no_grad()
def compute_hidden_states(
    pipe: DiffusionPipeline, name: str, prompts: Sequence[str]
) -> Float[Tensor, "tokens width"]:
    """Return the last hidden states of a text encoder for prompts, without padding, in fp32."""
    encoder = pipe.components[name]
    tokenizer = pipe.components[name.replace("text_encoder", "tokenizer")]
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
    tokens = tokens.to(encoder.device)
    mask = tokens["attention_mask"]
    output = encoder(input_ids=tokens["input_ids"], attention_mask=mask)
    return output.last_hidden_state[mask.bool()].float()


def count_state_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's state dict. A tensor with several names counts once."""
    sizes = {id(value): value.nbytes for value in module.state_dict(keep_vars=True).values()}
    return sum(sizes.values())
