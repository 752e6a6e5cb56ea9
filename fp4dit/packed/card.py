"""The model card of an exported checkpoint: what was done, how good it is, and what nobody tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    `weights` and `activations` are the layers of the audits, `scores` is a metrics.json, `bytes` the transformer's
    tensors as they lie and `bytes16` as they would in 16 bits, `tools` the versions of packages.
    """

    base: str
    pipeline: str
    weights: Sequence[Mapping[str, Any]]
    activations: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Any]
    bytes: int
    bytes16: int
    text_encoder: str | None
    command: str
    tools: Mapping[str, str]

    @property
    def layers(self) -> Sequence[Mapping[str, Any]]:
        return [layer for layer in self.weights if layer["format"] != "fp16"]


def card(facts: Facts) -> str:
    """Markdown, with what the Hugging Face hub reads at its top."""
    size = (
        f"{facts.bytes / 1e6:.1f} MB, {facts.bytes / facts.bytes16:.3f} of the {facts.bytes16 / 1e6:.1f} MB in 16 bits"
    )
    parts = [
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [fp4dit, quantized]\n---",
        f"# {facts.base}, quantized by fp4dit",
        f"The transformer takes {size}. {facts.text_encoder or 'Nothing else of the pipeline is quantized.'}",
        f"```python\nimport fp4dit  # tells diffusers how to read it\nfrom diffusers import {facts.pipeline}\n\n"
        f'pipe = {facts.pipeline}.from_pretrained("this/folder")\n```',
        "## What was quantized",
        *(table(title, layers) for title, layers in (("Weights", facts.layers), ("Activations", facts.activations))),
        "## How good it is",
        scored(facts.scores),
        "## How it was made",
        f"```\n{facts.command}\n```",
        "with " + ", ".join(f"{name} {version}" for name, version in facts.tools.items()) + ".",
        "## Not tested",
        untested(facts),
    ]
    return "\n\n".join(parts) + "\n"


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
