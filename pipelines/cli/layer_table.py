"""Tables of what a run quantizes, and how, for `pipelines.inspect`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import filter_by_unit
from fp4dit.quantization import audit, rules
from fp4dit.quantization.audit import LayerAudit
from fp4dit.utils.formatting import align_columns, format_bytes

Line = tuple[str, ...]

HEADING = ("layer or operand", "shape", "weight", "bits", "rule", "input", "bits", "rule")

NOT_QUANTIZED = ("16 bit", "", "")


@dataclass(frozen=True)
class BlockLines:
    """The lines of one transformer block, which are compared to merge equal neighbours."""

    name: str
    lines: tuple[Line, ...]

    @property
    def stem(self) -> str:
        """The block's name without its number."""
        return self.name.rstrip("0123456789")


def format_layer_table(
    skeleton: Pipeline,
    operands: Sequence[str],
    weights: Sequence[LayerAudit],
    inputs: Sequence[LayerAudit],
    merge: bool,
) -> Iterator[str]:
    """Yield a heading, and a line for each layer and each operand of attention, block by block.

    Args:
        skeleton: The model on the meta device.
        operands: Names of the activations that can be quantized.
        weights: The audit of the weights.
        inputs: The audit of the activations.
        merge: Show equal neighbouring blocks once.
    """
    blocks = _collect_block_lines(skeleton, operands, weights, inputs)
    # Each item is a list of equal blocks, whose lines are shown once.
    shown = [[block] for block in blocks]
    if merge:
        shown = [
            list(equal) for _, equal in groupby(blocks, key=lambda block: (block.stem, block.lines))
        ]
    lines: list[Line] = [HEADING]
    for equal_blocks in shown:
        lines += equal_blocks[0].lines
    texts = iter(align_columns(lines))
    yield f"  {next(texts)}"
    for equal_blocks in shown:
        first, last = equal_blocks[0], equal_blocks[-1]
        number = last.name.removeprefix(last.stem)
        yield first.name if first is last else f"{first.name}-{number}"
        for _ in first.lines:
            yield f"  {next(texts)}"


def _collect_block_lines(
    skeleton: Pipeline,
    operands: Sequence[str],
    weights: Sequence[LayerAudit],
    inputs: Sequence[LayerAudit],
) -> list[BlockLines]:
    layers = rules.find_layers(skeleton.transformer)
    attention_operands = [name for name in operands if name not in layers]
    names = dict.fromkeys([*attention_operands, *layers])
    weight_cells = {entry.name: describe_layer(entry) for entry in weights}
    input_cells = {entry.name: describe_layer(entry) for entry in inputs}
    blocks = []
    for unit in skeleton.units():
        lines = []
        for name in filter_by_unit(names, unit):
            shape, cells = "", ("", "", "")
            if name in layers:
                shape = "x".join(map(str, layers[name].weight.shape))  # pyright: ignore
                cells = weight_cells.get(name, cells)
            short_name = name.removeprefix(f"{unit.module}.")
            lines.append((short_name, shape, *cells, *input_cells.get(name, NOT_QUANTIZED)))
        blocks.append(BlockLines(unit.module, tuple(lines)))
    return blocks


def describe_layer(entry: LayerAudit) -> Line:
    """Return the cells of a weight or an input: its format, its bits, and its rule."""
    if entry.format == "fp16":
        return NOT_QUANTIZED
    return entry.format, f"{entry.bits:.2f}", entry.rule


def format_totals(
    skeleton: Pipeline, weights: Sequence[LayerAudit], inputs: Sequence[LayerAudit]
) -> Iterator[str]:
    """Yield the bits of all weights and activations, and the size of the checkpoint."""
    num_quantized = sum(entry.format != "fp16" for entry in weights)
    weight_bits = audit.effective_bits(weights)
    input_bits = audit.effective_bits(inputs) if inputs else 16.0
    packed = format_bytes(audit.checkpoint_bytes(skeleton.transformer, weights))
    plain = format_bytes(audit.checkpoint_bytes(skeleton.transformer, []))
    yield (
        f"layers       {num_quantized} of {len(weights)} quantized: "
        f"{weight_bits:.2f} bits per weight"
    )
    yield f"activations  {len(inputs)} quantized: {input_bits:.2f} bits per value"
    yield f"checkpoint   {packed}; {plain} in 16 bits"
