"""Tables of what is quantized in a model, and how."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from fp4dit.analysis.forecast import FormatForecast
from fp4dit.quantization.audit import LayerAudit, checkpoint_bytes, effective_bits
from fp4dit.quantization.rules import find_layers
from fp4dit.utils.formatting import align_columns, format_bytes

Line = tuple[str, ...]

HEADING = ("layer or operand", "shape", "weight", "bits", "rule", "input", "bits", "rule")

NOT_QUANTIZED = ("16 bit", "", "")


@dataclass(frozen=True)
class BlockLines:
    """The lines of the table for one block, or for several equal blocks that follow each other.

    Attributes:
        title: Name of the block, or of the first and the last one: `transformer_blocks.0-27`.
        lines: A line of cells for each operand of attention and for each layer.
    """

    title: str
    lines: Sequence[Line]


@dataclass(frozen=True)
class ModelAudit:
    """What is quantized in one model, and what is not.

    Attributes:
        shapes: Shape of the weight of each layer.
        weights: Row of each layer.
        inputs: Row of each activation that is quantized.
        operands: Names of the activations that could be quantized, those of attention among them.
        bytes: Size of the packed model.
        bytes16: Size of the model in 16 bits.
        block_errors: Relative squared error of the outputs of each block, if it was measured.
        forecast: Which 4-bit format is expected to have the least error, if weights were there.

    Example:
        >>> audit = audit_model(transformer, audit_weights(transformer, rules))
        >>> print("\\n".join(audit.format_lines()))
    """

    shapes: Mapping[str, Sequence[int]]
    weights: Sequence[LayerAudit]
    inputs: Sequence[LayerAudit]
    operands: Sequence[str]
    bytes: int
    bytes16: int
    block_errors: Mapping[str, float] = field(default_factory=dict)
    forecast: FormatForecast | None = None

    @property
    def num_quantized(self) -> int:
        """Number of layers whose weights are quantized."""
        return sum(entry.format != "fp16" for entry in self.weights)

    @property
    def bits_weight(self) -> float:
        """Mean bits per weight of all layers, with their scales."""
        return effective_bits(self.weights)

    @property
    def bits_activation(self) -> float:
        """Mean bits per value of the quantized activations, with their scales."""
        return effective_bits(self.inputs) if self.inputs else 16.0

    @property
    def reasons_left(self) -> dict[str, str]:
        """The layers whose weights stay in 16 bits, and why."""
        reasons = {}
        for entry in self.weights:
            if entry.format == "fp16":
                reasons[entry.name] = f"the rule {entry.rule!r} leaves it in 16 bits"
                if entry.rule == "-":
                    reasons[entry.name] = "no rule matches it"
        return reasons

    def list_blocks(self, merge: bool = True) -> list[BlockLines]:
        """Return the lines of the table, block by block.

        Args:
            merge: Whether equal blocks that follow each other are shown once.
        """
        weights = {entry.name: describe_layer(entry) for entry in self.weights}
        inputs = {entry.name: describe_layer(entry) for entry in self.inputs}
        lines_by_block: dict[str, list[Line]] = {}
        for name in dict.fromkeys([*self.operands, *self.shapes]):
            block = get_block_name(name)
            shape = "x".join(map(str, self.shapes.get(name, ())))
            cells = weights.get(name, ("", "", ""))
            line = (
                name.removeprefix(f"{block}."),
                shape,
                *cells,
                *inputs.get(name, NOT_QUANTIZED),
            )
            lines_by_block.setdefault(block, []).append(line)
        blocks = []
        for block in dict.fromkeys(map(get_block_name, [*self.shapes, *self.operands])):
            layers_last = sorted(lines_by_block[block], key=lambda line: bool(line[1]))
            blocks.append(BlockLines(block, tuple(layers_last)))
        return merge_equal_blocks(blocks) if merge else blocks

    def format_lines(self, merge: bool = True) -> Iterator[str]:
        """Yield a heading, and a line for each layer and operand, block by block."""
        blocks = self.list_blocks(merge)
        lines: list[Line] = [HEADING]
        for block in blocks:
            lines += block.lines
        texts = iter(align_columns(lines))
        yield f"  {next(texts)}"
        for block in blocks:
            yield block.title
            for _ in block.lines:
                yield f"  {next(texts)}"

    def format_totals(self) -> Iterator[str]:
        """Yield the bits of weights and activations, the size, errors of blocks, and a forecast."""
        yield (
            f"layers       {self.num_quantized} of {len(self.weights)} quantized: "
            f"{self.bits_weight:.2f} bits per weight"
        )
        yield (
            f"activations  {len(self.inputs)} quantized: {self.bits_activation:.2f} bits per value"
        )
        yield f"checkpoint   {format_bytes(self.bytes)}; {format_bytes(self.bytes16)} in 16 bits"
        if self.block_errors:
            worst = max(self.block_errors, key=self.block_errors.__getitem__)
            mean = sum(self.block_errors.values()) / len(self.block_errors)
            largest = f"{self.block_errors[worst]:.4f} at {worst}"
            yield f"block error  {mean:.4f} on average; the largest is {largest}"
        if self.forecast:
            for label, line in zip(("formats", "", ""), self.forecast.format_lines(), strict=False):
                yield f"{label:13}{line}"


def audit_model(
    model: nn.Module,
    weights: Sequence[LayerAudit],
    inputs: Sequence[LayerAudit] = (),
    operands: Sequence[str] = (),
) -> ModelAudit:
    """Collect what a table of a model needs.

    Args:
        model: The model before it is quantized, possibly on the meta device.
        weights: The audit of the weights.
        inputs: The audit of the activations.
        operands: Names of the activations that could be quantized.
    """
    shapes = {name: tuple(layer.weight.shape) for name, layer in find_layers(model).items()}  # pyright: ignore
    sizes = checkpoint_bytes(model, weights), checkpoint_bytes(model, [])
    return ModelAudit(shapes, weights, inputs, operands, *sizes)


def get_block_name(name: str) -> str:
    """Return the name of the block that a layer or an activation is in.

    It ends with the first number of the name; without a number, it is the first part.

    >>> get_block_name("transformer_blocks.3.attn1.to_q"), get_block_name("pos_embed.proj")
    ('transformer_blocks.3', 'pos_embed')
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


def merge_equal_blocks(blocks: Sequence[BlockLines]) -> list[BlockLines]:
    """Join blocks with equal lines that follow each other and differ in their numbers only."""
    merged = []
    for (stem, lines), equal in groupby(
        blocks, key=lambda block: (block.title.rstrip("0123456789"), block.lines)
    ):
        first, *others = [block.title for block in equal]
        title = f"{first}-{others[-1].removeprefix(stem)}" if others else first
        merged.append(BlockLines(title, lines))
    return merged


def describe_layer(entry: LayerAudit) -> Line:
    """Return the cells of a weight or an input: its format, its bits, and its rule."""
    if entry.format == "fp16":
        return NOT_QUANTIZED
    return entry.format, f"{entry.bits:.2f}", entry.rule
