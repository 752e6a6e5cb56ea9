"""Pack the transformer of a quantized pipeline, and quantize and pack its text encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp4dit.numerics.rounding import RoundingFunction, round_to_nearest
from fp4dit.packed.integrations import diffusers, transformers
from fp4dit.packed.model import describe_model
from fp4dit.packed.nn.linear import pack_layers_
from fp4dit.packed.quantize import (
    assign_text_encoder_rules,
    assign_transformer_rules,
    check_text_encoder_rules,
    quantize_and_pack_,
    with_packed_formats,
)
from fp4dit.quantization.audit import LayerAudit, checkpoint_bytes
from fp4dit.quantization.rules import Rule
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


def quantize_to_nearest_(
    dit: ModelMixin,
    weight: Sequence[Rule],
    activation: Sequence[Rule] = (),
    rounding: RoundingFunction = round_to_nearest,
) -> list[LayerAudit]:
    """Quantize and pack a transformer in place, from its weights alone.

    The result equals that of the stages reconstruct, activate and export to the bit. Each layer is
    packed before the next one is touched. `save_pretrained` then saves a packed model.

    Args:
        dit: The transformer, with its weights.
        weight: The rules for weights.
        activation: The rules for activations.
        rounding: The function that rounds each weight, as `RoundingMethod.elementwise_rounding`.

    Returns:
        The audit of the layers.

    Raises:
        UserError: if no layer would be quantized, or a rule does not fit. Nothing is changed then.

    Example:
        >>> assert explain_data_need(weight, activation, RoundToNearest()) is None
        >>> audit = quantize_to_nearest_(pipe.transformer, weight, activation)
    """
    assigned = assign_transformer_rules(dit, weight, activation, rounding)
    diffusers.attach_diffusers_config_(dit, quantize_and_pack_(dit, assigned))
    return with_packed_formats(dit, assigned.audit)


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
        UserError: if there is no text encoder, or as `quantize_encoder_` does.
    """
    check_text_encoder_rules(rules)
    _, encoder = find_largest_encoder(pipe)
    return quantize_encoder_(encoder, rules)


def quantize_encoder_(encoder: PreTrainedModel, rules: Sequence[Rule]) -> list[LayerAudit]:
    """Quantize the linear layers in the blocks of a text encoder, in place.

    Returns:
        The audit of the layers.

    Raises:
        UserError: if a rule matches nothing, needs calibration or does not fit a layer, or if
            nothing would be quantized. Nothing is changed then.
    """
    assigned = assign_text_encoder_rules(encoder, rules)
    transformers.attach_transformers_config_(encoder, quantize_and_pack_(encoder, assigned))
    return with_packed_formats(encoder, assigned.audit)


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
