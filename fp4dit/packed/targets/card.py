"""Model card of a checkpoint in the format of another library."""

from collections.abc import Sequence

from fp4dit.packed.targets.base import StoredModel, Target

CARD_HEADER = """\
---
library_name: diffusers
tags: [{tag}, quantized]
---"""

KEPT_SECTION = "## What was quantized"  # of the card of the packed checkpoint, and all after it


def render_export_card(
    target: Target,
    stored: StoredModel,
    notes: Sequence[str],
    pipeline: str | None,
    packed_card: str = "",
) -> str:
    """Return the card in Markdown.

    Args:
        target: The format.
        stored: The transformer.
        notes: What is exact and what readers do otherwise, as clauses.
        pipeline: The name of the pipeline's class, if the folder is that of a pipeline.
        packed_card: The card of the packed checkpoint, if there is one. What it says of the
            quantization and of scores is kept.
    """
    example = target.write_example(stored.class_name, pipeline, stored.dtype)
    dtype = str(stored.dtype).removeprefix("torch.")
    name = pipeline or stored.class_name
    parts = [
        CARD_HEADER.format(tag=target.name),
        f"# {name} as {target.name}",
        f"Quantized by fp4dit, which is not needed to load it. Readers need `pip install "
        f"{target.packages}`.",
        f"```python\n{example}\n```",
        f"In {dtype} the weights are exactly those that fp4dit computed, to the bit. In another "
        "dtype, readers may round them otherwise.",
        "## What this format holds",
        "\n".join(f"- {note[0].upper()}{note[1:]}." for note in notes),
        f"Left as they were: {', '.join(f'`{name}`' for name in stored.left) or 'no layer'}.",
    ]
    _, section, rest = packed_card.partition(KEPT_SECTION)
    if section:
        parts.append(section + rest.rstrip())
    return "\n\n".join(parts) + "\n"
