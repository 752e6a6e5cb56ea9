"""The report of a quantized pipeline, which prints as a table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from html import escape

from fp4dit.models.hub_files import find_transformers
from fp4dit.quantization.audit import effective_bits
from fp4dit.quantization.audit_table import HEADING, ModelAudit
from fp4dit.utils.formatting import format_duration


@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What is quantized in a pipeline, what is left in 16 bits and why, and the sizes.

    It prints as a table, and a notebook shows it as one.

    Attributes:
        method: Name of the preset.
        pipeline: Name of the pipeline's class.
        components: Audit of each component that is quantized, by its name.
        seconds: Time that quantizing took; 0 if nothing has been done yet.

    Example:
        >>> report = fp4dit.quantize(pipe, "nvfp4_4over6")
        >>> print(report)
        >>> report.bits_weight, report.bytes / report.bytes16
        (4.5, 0.28)
    """

    method: str
    pipeline: str
    components: Mapping[str, ModelAudit] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def transformer(self) -> ModelAudit:
        """Audit of the transformer, or of the first one."""
        return self.transformers[0]

    @property
    def transformers(self) -> list[ModelAudit]:
        """Audits of all transformers that are quantized."""
        return list(find_transformers(self.components).values())

    @property
    def bits_weight(self) -> float:
        """Mean bits per weight of the transformers' layers, with their scales."""
        return effective_bits([entry for audit in self.transformers for entry in audit.weights])

    @property
    def bits_activation(self) -> float:
        """Mean bits per value of the transformers' quantized activations, with their scales."""
        inputs = [entry for audit in self.transformers for entry in audit.inputs]
        return effective_bits(inputs) if inputs else 16.0

    @property
    def bytes(self) -> int:
        """Size of the components after quantization."""
        return sum(audit.bytes for audit in self.components.values())

    @property
    def bytes16(self) -> int:
        """Size of the same components in 16 bits."""
        return sum(audit.bytes16 for audit in self.components.values())

    @property
    def block_errors(self) -> Mapping[str, float]:
        """Relative squared error of the outputs of each block of the transformers, on validation
        prompts; empty for presets that need no data. Blocks of a second transformer have its name.
        """
        errors = dict(self.transformer.block_errors)
        for name, audit in self.components.items():
            if audit is not self.transformer:
                errors |= {f"{name}.{unit}": error for unit, error in audit.block_errors.items()}
        return errors

    @property
    def reasons_left(self) -> dict[str, str]:
        """The layers whose weights stay in 16 bits, as `component.layer`, and why."""
        reasons = {}
        for component, audit in self.components.items():
            for name, reason in audit.reasons_left.items():
                reasons[f"{component}.{name}"] = reason
        return reasons

    def __str__(self) -> str:
        return "\n".join(self.format_lines())

    __repr__ = __str__

    def format_lines(self) -> Iterator[str]:
        """Yield the lines of the report as text."""
        yield self.title
        for name, audit in self.components.items():
            yield from ("", f"{name}:", *audit.format_lines(), "", *audit.format_totals())
        for name, reason in self.reasons_left.items():
            yield f"in 16 bits   {name}: {reason}"

    @property
    def title(self) -> str:
        """The first line of the report."""
        time = f", in {format_duration(self.seconds)}" if self.seconds else ""
        return f"{self.method} on {self.pipeline}{time}"

    def _repr_html_(self) -> str:
        parts = [f"<p><b>{escape(self.title)}</b></p>"]
        for name, audit in self.components.items():
            totals = "<br>".join(map(escape, audit.format_totals()))
            parts.append(f"<p><b>{escape(name)}</b></p>{render_audit(audit)}<p>{totals}</p>")
        left = [f"{name}: {reason}" for name, reason in self.reasons_left.items()]
        if left:
            parts.append(f"<p>In 16 bits:<br>{'<br>'.join(map(escape, left))}</p>")
        return "".join(parts)


def render_audit(audit: ModelAudit) -> str:
    """Return the table of one model as HTML."""
    heading = "".join(f"<th>{escape(title)}</th>" for title in HEADING)
    rows = [f"<tr>{heading}</tr>"]
    for block in audit.list_blocks():
        rows.append(f'<tr><th colspan="{len(HEADING)}">{escape(block.title)}</th></tr>')
        for line in block.lines:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
            rows.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(rows)}</table>"
