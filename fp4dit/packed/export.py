"""From a quantized pipeline to one whose transformer, and perhaps text encoder, is packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp4dit import policy
from fp4dit.errors import UserError
from fp4dit.packed import hub, text
from fp4dit.packed.description import described
from fp4dit.packed.layer import PackedLinear, pack_
from fp4dit.policy import Entry, Rule


def pack_transformer_(dit: ModelMixin, weight: Mapping[str, Rule], activation: Mapping[str, Rule]) -> None:
    """Pack a transformer that these rules quantized, by layer and by activation, in place; it saves itself as that.

    Raises:
        UserError: if a weight cannot be packed.
    """
    hub.attach(dit, described(pack_(dit), weight, activation))


@dataclass(frozen=True)
class TextEncoder:
    """What was done to the text encoder that is the component `name`. `bytes` are its tensors as they lie, `bytes16` as
    they would in 16 bits, and `error` is that of its last hidden states on `prompts` prompts, relative."""

    name: str
    kind: str
    layers: Sequence[Entry]
    bytes: int
    bytes16: int
    error: float
    prompts: int


def pack_text_encoder_(pipe: DiffusionPipeline, rules: Sequence[Rule], prompts: Sequence[str]) -> TextEncoder:
    """`quantize_text_encoder_`, and what that did.

    Raises:
        UserError: as that.
    """
    name, encoder = largest_encoder(pipe)
    bytes16, before = policy.checkpoint_bytes(encoder, []), hidden_states(pipe, name, prompts)
    layers = quantize_text_encoder_(pipe, rules)
    error = (hidden_states(pipe, name, prompts) - before).norm() / before.norm()
    return TextEncoder(name, type(encoder).__name__, layers, size(encoder), bytes16, error.item(), len(prompts))


def quantize_text_encoder_(pipe: DiffusionPipeline, rules: Sequence[Rule]) -> list[Entry]:
    """Round the linear layers in the blocks of a pipeline's largest text encoder to nearest, as the rules say, and pack
    each before the next is touched, in place; an audit of them. The encoder then saves itself as packed.

    Raises:
        UserError: if there is no text encoder, a rule is idle, needs calibration or does not fit, or nothing would be
            quantized. Nothing is changed then.
    """
    check_rules(rules)
    _, encoder = largest_encoder(pipe)
    names = in_blocks(encoder)
    chosen = policy.assign(names, rules)
    audit = [policy.entry(name, encoder.get_submodule(name), chosen.get(name)) for name in names]
    quantized = {name: rule for name, rule in chosen.items() if rule.quantizer}
    if not quantized:
        raise UserError("no layer of the text encoder is quantized: give a rule a quantizer, or use text_encoder=none")
    layers: dict[str, PackedLinear] = {}
    for name, rule in quantized.items():
        policy.quantize_weights_(encoder, {name: rule})[name].prepare().freeze()
        layers |= pack_(encoder)
    text.attach(encoder, described(layers, quantized, {}))
    return audit


def check_rules(rules: Sequence[Rule]) -> None:
    """Raises UserError if a rule asks for what a text encoder cannot have."""
    for rule in rules:
        if rule.transforms or rule.ranges:
            raise UserError(
                f"the text_encoder rule {rule.match!r} has transforms or ranges of timesteps: a text encoder is not "
                "calibrated and has no timesteps, its weights are rounded to nearest as they are"
            )


def largest_encoder(pipe: DiffusionPipeline) -> tuple[str, PreTrainedModel]:
    """By parameters, with its name among the components. Raises UserError if there is none."""
    components: Mapping[str, Any] = pipe.components
    found = {name: part for name, part in components.items() if name.startswith("text_encoder") and part is not None}
    if not found:
        raise UserError(
            f"this {type(pipe).__name__} has no text encoder that could be quantized: use text_encoder=none"
        )
    name = max(found, key=lambda name: sum(p.numel() for p in found[name].parameters()))
    return name, found[name]


def in_blocks(model: nn.Module) -> list[str]:
    """The names of the linear layers in lists of blocks: neither poolers nor projections of what comes out."""
    return [name for name in policy.layers(model) if any(part.isdigit() for part in name.split("."))]


@torch.no_grad()
def hidden_states(pipe: DiffusionPipeline, name: str, prompts: Sequence[str]) -> Float[Tensor, "tokens width"]:
    """The last ones that the text encoder of this name has for these prompts, padding left out, in fp32."""
    encoder, tokenizer = (pipe.components[name.replace("text_encoder", part)] for part in ("text_encoder", "tokenizer"))
    tokens = tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(encoder.device)
    mask = tokens["attention_mask"]
    return encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state[mask.bool()].float()


def size(module: nn.Module) -> int:
    """Bytes of all that is saved of it: what two names share, once."""
    return sum({id(value): value.nbytes for value in module.state_dict(keep_vars=True).values()}.values())
