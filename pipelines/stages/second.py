"""The second transformer of a pipeline with two, which has stages of its own up to its scales."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fp4dit.models.base import Pipeline
from fp4dit.models.pretrained import PretrainedSource
from fp4dit.packed.export import pack_transformer_
from fp4dit.quantization.audit import checkpoint_bytes
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.rounding.unit_files import load_quantized_
from pipelines.stages.base import Needs


@dataclass(frozen=True)
class SecondTransformer:
    """The second transformer, as a part of the stages that draw with both.

    The roles of its inputs end in `_2`, as in `weights_2`.

    Args:
        model: The source of the pipeline, which chooses this transformer.
        weight: The rules for its weights.
        activation: The rules for its activations.

    Example:
        See the node `generate` of `conf/stages/experts.yaml`.
    """

    model: PretrainedSource
    weight: Sequence[Rule]
    activation: Sequence[Rule]

    def find_transformer(self, pipeline: Any) -> Any:
        """Return the transformer in a pipeline."""
        return getattr(pipeline.pipe, self.model.component)

    def load_(self, pipeline: Pipeline, needs: Needs) -> dict[str, Rule]:
        """Quantize the transformer in place, with the results of its stages.

        Returns:
            The rules of its activations, by name.
        """
        pipe: Any = getattr(pipeline, "pipe")  # noqa: B009  # pipelines in general have none
        adapter = self.model.make_adapter(self.find_transformer(pipeline), pipe)
        _, input_rules = load_quantized_(
            adapter, self.weight, self.activation, needs["weights_2"], needs["activations_2"]
        )
        return input_rules

    def pack_(self, pipeline: Pipeline, needs: Needs) -> int:
        """Load the results of its stages, and pack the transformer in place.

        Returns:
            The bytes of the transformer with all tensors in 16 bits.
        """
        transformer = self.find_transformer(pipeline)
        rules = assign_rules(find_layers(transformer), self.weight)
        input_rules = self.load_(pipeline, needs)
        bytes16 = checkpoint_bytes(transformer, [])
        pack_transformer_(transformer, rules, input_rules)
        return bytes16
