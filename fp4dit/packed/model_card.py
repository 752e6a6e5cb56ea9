"""Model card of an exported checkpoint: quantization, scores, command, and what is untested."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4dit.packed.export import TextEncoderReport
from fp4dit.quantization.audit import audit_to_dicts


@dataclass(frozen=True)
class PipelineCall:
    """Call of a pipeline that draws one image.

    Args:
        subject: The prompt, or the number of a class.
        seed: The seed of the noise.
        steps: The number of denoising steps.
        guidance: The scale of classifier-free guidance.
        options: Further arguments of the pipeline.
    """

    subject: str | int
    seed: int
    steps: int
    guidance: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """Facts that a model card shows.

    Args:
        base: The original model, a hub id or a folder.
        pipeline: The name of the pipeline's class.
        call: How the first scored image was drawn; None if the pipeline has no text encoder.
        weights: The layers of the weights' audit.
        activations: The layers of the activations' audit.
        scores: The contents of metrics.json.
        bytes: The size of the packed transformer.
        bytes16: Its size with all tensors in 16 bits.
        text_encoder: What is quantized in the text encoder; None if nothing is.
        command: The command that made the export.
        tools: Versions of packages, by name.
        is_video: Whether the pipeline draws videos.
        transformers: The number of packed transformers.

    Example:
        >>> text = render_model_card(facts)  # in Markdown
    """

    base: str
    pipeline: str
    call: PipelineCall | None
    weights: Sequence[Mapping[str, Any]]
    activations: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    bytes: int
    bytes16: int
    text_encoder: TextEncoderReport | None
    command: str
    tools: Mapping[str, str]
    is_video: bool = False
    transformers: int = 1

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        """The layers whose weights are quantized."""
        return select_quantized(self.weights)


CARD_HEADER = """\
---
library_name: diffusers
pipeline_tag: text-to-{}
tags: [fp4dit, quantized]
---"""


def render_model_card(facts: CardFacts) -> str:
    """Return the card in Markdown, with the header that the Hugging Face hub reads."""
    encoder, size = facts.text_encoder, format_size(facts.bytes, facts.bytes16)
    if facts.call:
        snippet_note = (
            "The scored images were drawn by this call; prompt and seed are those of the first one."
        )
    else:
        snippet_note = (
            "It has no text encoder: give `from_pretrained` the original's, as `text_encoder=` and "
            "`tokenizer=`."
        )
    subject = "The transformer takes"
    if facts.transformers > 1:
        subject = f"The {facts.transformers} transformers take together"
    tables = [
        render_layer_table("Weights", facts.layers),
        render_layer_table("Activations", facts.activations),
    ]
    if encoder:
        layers = select_quantized(audit_to_dicts(encoder.layers))
        tables.append(render_layer_table("Weights of the text encoder", layers))
    versions = ", ".join(f"{name} {version}" for name, version in facts.tools.items())
    parts = [
        CARD_HEADER.format("video" if facts.is_video else "image"),
        f"# {facts.base}, quantized by fp4dit",
        f"{subject} {size}. {describe_text_encoder(encoder)}",
        f"```python\n{render_snippet(facts)}\n```",
        snippet_note,
        "## What was quantized",
        *tables,
        "## Scores",
        render_scores(facts.scores),
        "## How it was made",
        f"```\n{facts.command}\n```",
        f"with {versions}.",
        "## Not tested",
        describe_limits(facts),
    ]
    return "\n\n".join(parts) + "\n"


def render_snippet(facts: CardFacts) -> str:
    """Return Python code that loads the pipeline, and draws an image if the card has a call."""
    load = f'pipe = {facts.pipeline}.from_pretrained("this/folder")'
    imports = ["import fp4dit  # tells diffusers how to read it"]
    call = facts.call
    if call is None:
        return "\n".join([*imports, f"from diffusers import {facts.pipeline}", "", load])
    options = {
        "num_inference_steps": call.steps,
        "guidance_scale": call.guidance,
        **call.options,
    }
    arguments = [f"[{call.subject!r}]"]
    arguments += [f"{name}={value!r}" for name, value in options.items()]
    arguments.append(f"generator=torch.Generator().manual_seed({call.seed})")
    lines = [*imports, "import torch", f"from diffusers import {facts.pipeline}", "", load]
    lines.append("frames = pipe(" if facts.is_video else "image = pipe(")
    lines += [f"    {argument}," for argument in arguments]
    lines.append(").frames[0]" if facts.is_video else ").images[0]")
    return "\n".join(lines)


def select_quantized(layers: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the layers of an audit that are quantized."""
    return [layer for layer in layers if layer["format"] != "fp16"]


def format_size(size: int, size16: int) -> str:
    """Return a size in bytes as text, beside the size in 16 bits."""
    return f"{size / 1e6:.1f} MB, {size / size16:.3f} of the {size16 / 1e6:.1f} MB in 16 bits"


def describe_text_encoder(encoder: TextEncoderReport | None) -> str:
    """Return a sentence on the text encoder."""
    if encoder is None:
        return "Nothing else of the pipeline is quantized."
    size = format_size(encoder.bytes, encoder.bytes16)
    return (
        f"`{encoder.name}`, a {encoder.kind}, takes {size}: its weights are rounded to nearest, "
        f"which changes its hidden states on {encoder.prompts} prompts by {encoder.error:.2%}. The "
        "images that were scored were drawn with the original one."
    )


def render_layer_table(title: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of how many layers have which format, by rule."""
    if not layers:
        return f"{title}: none."
    layers_by_kind: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in layers:
        layers_by_kind.setdefault((layer["rule"], layer["format"]), []).append(layer)
    rows = [f"| {title} like | format | how many | bits, scales counted |", "|---|---|---:|---:|"]
    for (rule, fmt), group in layers_by_kind.items():
        values = sum(layer["values"] for layer in group)
        bits = sum(layer["bits"] * layer["values"] for layer in group) / values
        rows.append(f"| `{rule}` | {fmt} | {len(group)} | {bits:.2f} |")
    return "\n".join(rows)


def render_scores(scores: Mapping[str, Any]) -> str:
    """Return a table of the scores with their intervals, and notes on the metrics."""
    rows = ["| metric | mean | 95 % interval |", "|---|---:|---:|"]
    for name, score in scores["metrics"].items():
        if score is not None:
            interval = f"{score['low']:.4g} to {score['high']:.4g}"
            rows.append(f"| {name} | {score['mean']:.4g} | {interval} |")
    notes = [f"- `{name}`: {text}" for name, text in scores["about"].items() if text]
    return "\n".join([*rows, "", f"Number of images: {scores['n']}.", "", *notes])


def describe_limits(facts: CardFacts) -> str:
    """Return the text of the section on what is untested."""
    return (
        f"Other prompts than the {facts.scores['n']} that were scored; other samplers, numbers of "
        "steps, guidance and image sizes than those of the command above; fine-tunes and adapters "
        "on top; and what the metrics do not see, such as text in images, faces and hands. What "
        "the original should not be used for, this should not either."
    )
