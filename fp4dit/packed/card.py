"""The model card of an exported checkpoint: what was done, how good it is, and what nobody tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fp4dit.packed.export import TextEncoder
from fp4dit.policy import as_rows


@dataclass(frozen=True)
class Call:
    """Of a pipeline: a prompt or class, its seed, and how the sampler draws it."""

    subject: str | int
    seed: int
    steps: int
    guidance: float
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    `call` is how the first image that was scored was drawn; None if the pipeline has no text encoder to do so again.
    `weights` and `activations` are the layers of the audits, `scores` is a metrics.json, `bytes` the transformer's
    tensors as they lie and `bytes16` as they would in 16 bits, `tools` the versions of packages.
    """

    base: str
    pipeline: str
    call: Call | None
    weights: Sequence[Mapping[str, Any]]
    activations: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    bytes: int
    bytes16: int
    text_encoder: TextEncoder | None
    command: str
    tools: Mapping[str, str]

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        return quantized(self.weights)


def card(facts: Facts) -> str:
    """Markdown, with what the Hugging Face hub reads at its top."""
    encoder = facts.text_encoder
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [fp4dit, quantized]\n---",
        f"# {facts.base}, quantized by fp4dit",
        f"The transformer takes {sized(facts.bytes, facts.bytes16)}. {rest(encoder)}",
        f"```python\n{snippet(facts)}\n```",
        "So the images that were scored were drawn; prompt and seed are the first one's."
        if facts.call
        else "It has no text encoder: give `from_pretrained` the original's, as `text_encoder=` and `tokenizer=`.",
        "## What was quantized",
        table("Weights", facts.layers),
        table("Activations", facts.activations),
        *([table("Weights of the text encoder", quantized(as_rows(encoder.layers)))] if encoder else []),
        "## How good it is",
        scored(facts.scores),
        "## How it was made",
        f"```\n{facts.command}\n```",
        "with " + ", ".join(f"{name} {version}" for name, version in facts.tools.items()) + ".",
        "## Not tested",
        untested(facts),
    ]
    return "\n\n".join(parts) + "\n"


def snippet(facts: Facts) -> str:
    """What draws an image."""
    lines = [
        "import fp4dit  # tells diffusers how to read it",
        *(["import torch"] if facts.call else []),
        f"from diffusers import {facts.pipeline}",
        "",
        f'pipe = {facts.pipeline}.from_pretrained("this/folder")',
    ]
    if facts.call:
        own = {"num_inference_steps": facts.call.steps, "guidance_scale": facts.call.guidance, **facts.call.options}
        given = [f"[{facts.call.subject!r}]", *(f"{name}={value!r}" for name, value in own.items())]
        given += [f"generator=torch.Generator().manual_seed({facts.call.seed})"]
        lines += ["image = pipe(", *(f"    {one}," for one in given), ").images[0]"]
    return "\n".join(lines)


def quantized(layers: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    return [layer for layer in layers if layer["format"] != "fp16"]


def sized(found: int, in16: int) -> str:
    return f"{found / 1e6:.1f} MB, {found / in16:.3f} of the {in16 / 1e6:.1f} MB in 16 bits"


def rest(encoder: TextEncoder | None) -> str:
    """What else of the pipeline is quantized."""
    if encoder is None:
        return "Nothing else of the pipeline is quantized."
    return (
        f"`{encoder.name}`, a {encoder.kind}, takes {sized(encoder.bytes, encoder.bytes16)}: its weights are rounded "
        f"to nearest, which changes its hidden states on {encoder.prompts} prompts by {encoder.error:.2%}. The images "
        "that were scored were drawn with the original one."
    )


def table(title: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """How many of the layers have which format, by the rule that says so."""
    if not layers:
        return f"{title}: none."
    alike: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for layer in layers:
        alike.setdefault((layer["rule"], layer["format"]), []).append(layer)
    rows = [f"| {title} like | format | how many | bits, scales counted |", "|---|---|---:|---:|"]
    for (rule, fmt), group in alike.items():
        values = sum(layer["values"] for layer in group)
        bits = sum(layer["bits"] * layer["values"] for layer in group) / values
        rows.append(f"| `{rule}` | {fmt} | {len(group)} | {bits:.2f} |")
    return "\n".join(rows)


def scored(scores: Mapping[str, Any]) -> str:
    rows = ["| metric | mean | 95 % interval |", "|---|---:|---:|"]
    for name, own in scores["metrics"].items():
        if own is not None:
            rows.append(f"| {name} | {own['mean']:.4g} | {own['low']:.4g} to {own['high']:.4g} |")
    about = "\n".join(f"- `{name}`: {text}" for name, text in scores["about"].items() if text)
    return "\n".join(rows) + f"\n\nOf {scores['n']} images.\n\n{about}"


def untested(facts: Facts) -> str:
    return (
        f"Other prompts than the {facts.scores['n']} that were scored; other samplers, numbers of steps, guidance and "
        "image sizes than those of the command above; fine-tunes and adapters on top; and what the metrics do not see, "
        "such as text in images, faces and hands. What the original should not be used for, this should not either."
    )
