"""Report what rules would quantize in a model, from its shapes alone."""

from collections.abc import Sequence
from dataclasses import replace

from fp4dit.estimate.footprint import measure_activation_shapes
from fp4dit.models.base import PipelineSource
from fp4dit.quantization.audit import audit_activation_shapes, audit_layers
from fp4dit.quantization.audit_table import ModelAudit, audit_model
from fp4dit.quantization.rules import Rule


def audit_transformer(
    source: PipelineSource, weight: Sequence[Rule], activation: Sequence[Rule]
) -> ModelAudit:
    """Return what rules would quantize in the transformer of a pipeline. No weight is loaded.

    Args:
        source: The source of the pipeline.
        weight: The rules for weights; without any, all of them stay in full precision.
        activation: The rules for activations.

    Raises:
        UserError: if there are rules for weights and none matches, or one does not fit the model.
    """
    skeleton = source.build_on_meta()
    audit = audit_model(skeleton.transformer, audit_layers(skeleton.transformer, weight))
    shapes = measure_activation_shapes(skeleton, weight)  # replaces the layers of the skeleton
    inputs = audit_activation_shapes(shapes, activation)
    return replace(audit, inputs=inputs, operands=list(shapes))
