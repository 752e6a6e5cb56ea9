"""Kurtosis and ratios of signal to noise of the layers of a model, before and after a rotation."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from benchmarks.format_curves import ROW, TENSOR
from fp4dit.analysis import measure_kurtosis, measure_signal_to_noise
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, make_element_quantizers
from fp4dit.models.generic import Generic
from fp4dit.models.weight_files import WeightFiles
from fp4dit.numerics import Granularity, PerChannel, PerGroup, PerTensor
from fp4dit.quantization.rules import find_layers
from fp4dit.transforms import Hadamard
from fp4dit.transforms.hadamard import has_hadamard_matrix
from fp4dit.utils.errors import UserError

MAX_VALUES = 2**18  # of a layer: of larger ones, evenly spaced rows are measured

GRANULARITIES: dict[int, Granularity] = {
    16: PerGroup(16),
    32: PerGroup(32),
    64: PerGroup(64),
    128: PerGroup(128),
    ROW: PerChannel(),
    TENSOR: PerTensor(),
}


@dataclass(frozen=True)
class LayerNoise:
    """What was measured of a layer.

    Attributes:
        name: The name of the layer.
        shape: The shape of its weight as a matrix.
        kurtosis: The excess kurtosis within blocks, by their size.
        ratios: The ratios of signal to noise in dB, by format and size.
        rotated: The same kurtosis and ratios after a Hadamard rotation of whole rows; None if there
            is no Hadamard matrix of that size.
    """

    name: str
    shape: tuple[int, int]
    kurtosis: Mapping[int, float]
    ratios: Mapping[tuple[str, int], float]
    rotated: "LayerNoise | None" = None

    @property
    def kind(self) -> str:
        """The name without the number of its block."""
        return re.sub(r"\.\d+\.", ".", self.name, count=1)


def measure_model(path: str) -> list[LayerNoise]:
    """Return what is measured of the linear layers of a transformer whose rows 128 divides.

    Args:
        path: The folder of a diffusers pipeline, its hub id, or `pkg://package/folder`.

    Raises:
        UserError: if its weights are not on this machine.
    """
    files = WeightFiles.find(path)
    if files is None:
        raise UserError(f"{path} has no safetensors of a transformer on this machine")
    layers = []
    for name, layer in find_layers(Generic(path).build_on_meta().transformer).items():
        rows, length = len(layer.weight), layer.weight[0].numel()  # pyright: ignore
        weight = files.read_rows(name, max(1, min(rows, MAX_VALUES // length)))
        if weight is not None and length % 128 == 0:
            layers.append(measure_layer(name, weight))
    return layers


def measure_layer(name: str, weight: Float[Tensor, "o k"], rotate: bool = True) -> LayerNoise:
    """Return what is measured of a weight."""
    kurtosis, ratios, rotated = {}, {}, None
    for size, granularity in GRANULARITIES.items():
        kurtosis[size] = measure_kurtosis(granularity, weight)
        found = measure_signal_to_noise(make_element_quantizers(granularity), weight)
        ratios |= {(fmt, size): ratio for fmt, ratio in found.items()}
    for fmt, ratio in measure_signal_to_noise(BLOCK_FORMATS, weight).items():
        granularity = BLOCK_FORMATS[fmt].granularity
        assert isinstance(granularity, PerGroup)
        ratios[fmt, granularity.size] = ratio
    rows, length = weight.shape
    if rotate and has_hadamard_matrix(length):
        turned = Hadamard()(rows, length).transform_weight(weight)
        rotated = measure_layer(name, turned, rotate=False)
    return LayerNoise(name, (rows, length), kurtosis, ratios, rotated)


def group_by_kind(layers: Sequence[LayerNoise]) -> Iterator[tuple[str, list[LayerNoise]]]:
    """Yield the layers of each kind, in the order of the model."""
    for kind in dict.fromkeys(layer.kind for layer in layers):
        yield kind, [layer for layer in layers if layer.kind == kind]
