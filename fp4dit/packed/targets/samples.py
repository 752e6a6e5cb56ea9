"""Tell from random layers whether a target holds the layers that rules quantize.

No weight of the model is read, so that this can be told before it is calibrated.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from fp4dit.packed.nn.linear import PackedLinear, pack_layer
from fp4dit.packed.targets.base import Target
from fp4dit.packed.targets.export import explain_refusals
from fp4dit.packed.targets.folders import COMPUTE_DTYPES
from fp4dit.quantization.rules import Rule, assign_rules, find_layers, make_quant_layer
from fp4dit.utils.errors import UserError

FEW_ROWS = 128  # of a weight, which show nearly always what is not exact

FEW_TOKENS = 8  # of the random inputs to which transforms are fitted


@dataclass
class Sample:
    """A layer with random weights, in place of all layers of its shape and rule.

    Attributes:
        names: The names of these layers.
        layer: The layer.
        rule: The rule.
        packed: What `pack` returned, by dtype.
    """

    names: list[str]
    layer: nn.Linear | nn.Conv2d
    rule: Rule

    packed: dict[str, PackedLinear | str] = field(default_factory=dict)

    def pack(self, dtype: str) -> PackedLinear | str:
        """Return the packed layer in a dtype, or why no format holds it."""
        if dtype not in self.packed:
            self.packed[dtype] = self.make_packed(dtype)
        return self.packed[dtype]

    def make_packed(self, dtype: str) -> PackedLinear | str:
        """Pack the layer in a dtype, or return why no format holds it."""
        if self.rule.timestep_boundaries:
            return "it has a layer for each range of timesteps"
        assert self.rule.quantizer is not None
        layer = copy.deepcopy(self.layer).to(COMPUTE_DTYPES[dtype])
        try:
            quantized = make_quant_layer(layer, self.rule.quantizer, self.rule.transforms)
            quantized.prepare(self.make_inputs() if self.rule.transforms else None)
            quantized.commit_weight()
            return pack_layer(quantized)
        except (UserError, ValueError) as error:
            return str(error)

    def make_inputs(self) -> Tensor:
        """Return random inputs of the layer, in fp32."""
        generator = torch.Generator().manual_seed(0)
        if isinstance(self.layer, nn.Conv2d):
            return torch.randn(1, self.layer.in_channels, 16, 16, generator=generator)
        return torch.randn(1, FEW_TOKENS, self.layer.in_features, generator=generator)


def make_samples(model: nn.Module, rules: Sequence[Rule], rows: int | None = None) -> list[Sample]:
    """Return samples of the layers of a model that the rules quantize.

    Args:
        model: The plain model, whose weights are not read.
        rules: The rules for its weights.
        rows: The largest number of rows of a sample without transforms; None for no limit.
    """
    samples: dict[tuple[str, str], Sample] = {}
    plain = find_layers(model)
    for name, rule in assign_rules(plain, rules).items():
        if rule.quantizer is not None:
            key = (repr(rule), repr(plain[name]))
            if key not in samples:
                # Few rows of a low-rank branch do not show what is not exact.
                layer = make_random(plain[name], None if rule.transforms else rows)
                samples[key] = Sample([], layer, rule)
            samples[key].names.append(name)
    return list(samples.values())


def make_random(layer: nn.Module, rows: int | None) -> nn.Linear | nn.Conv2d:
    """Return a layer with random weights like `layer`, of so many rows at most."""
    generator = torch.Generator().manual_seed(0)
    small = make_small(layer, rows)
    small.weight.data = torch.randn(small.weight.shape, generator=generator)
    return small


def make_small(layer: nn.Module, rows: int | None) -> nn.Linear | nn.Conv2d:
    """Return a new layer like `layer`, of about so many rows.

    The number of rows has the divisors of the original one, which targets may require.
    """
    count = len(layer.weight)  # pyright: ignore[reportArgumentType]
    out = rows + count % rows if rows and count > 2 * rows else count
    if isinstance(layer, nn.Conv2d):
        height, width = layer.kernel_size
        return nn.Conv2d(layer.in_channels, out, (height, width), device="cpu")
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, out, device="cpu")


def explain_layer(target: Target, sample: Sample, dtype: str) -> str:
    """Return why a target cannot hold a layer; an empty text if it can."""
    if sample.rule.transforms and not target.holds_transforms:
        names = ", ".join(type(spec).__name__ for spec in sample.rule.transforms)
        return f"it transforms its input ({names}): use transform=none"
    packed = sample.pack(dtype)
    if isinstance(packed, str):
        return packed
    try:
        target.store(packed, tuple(sample.layer.weight.shape), packed.dtype)
    except UserError as error:
        return str(error)
    return ""


def check_export(
    target: Target,
    model: nn.Module,
    rules: Sequence[Rule],
    dtype: str,
    dense: Sequence[str] = (),
) -> None:
    """Check that a target would hold the layers that rules quantize, if their weights were random.

    Args:
        target: The target.
        model: The plain model, whose weights are not read.
        rules: The rules for its weights.
        dtype: The dtype in which the weights have to be exact.
        dense: Patterns of the names of layers that are written as plain weights.

    Raises:
        UserError: if it would not. The message names the layers, with the reasons.
    """
    target.check_model(type(model).__name__)
    refused: dict[str, list[str]] = {}
    for sample in make_samples(model, rules, FEW_ROWS):
        names = [name for name in sample.names if not matches_any(name, dense)]
        if names and (reason := explain_layer(target, sample, dtype)):
            refused.setdefault(reason, []).extend(names)
    if refused:
        raise UserError(explain_refusals(target, refused))


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches one of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
