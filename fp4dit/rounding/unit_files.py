"""Files of a reconstruction, which hold the state of the quantized layers of each unit."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file

from fp4dit.calibration.activations import load_scales_
from fp4dit.models.base import Pipeline
from fp4dit.models.blocks import Unit, split_by_unit
from fp4dit.quantization.apply import quantize_activations_, quantize_weights_
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.utils.files import atomic_write_checksummed
from fp4dit.utils.safetensors_io import save_tensors

# What the results of stages contain: the folder of the units, and the file of activation scales.
UNITS, SCALES = "units", "scales.safetensors"


def load_quantized_(
    pipeline: Pipeline,
    weight: Sequence[Rule],
    activation: Sequence[Rule],
    weights_folder: Path,
    activations_folder: Path,
) -> tuple[dict[str, FakeQuantize], dict[str, Rule]]:
    """Quantize a model in place, with weights and static activation scales from files.

    Args:
        pipeline: The pipeline with the original model.
        weight: The rules for weights.
        activation: The rules for activations.
        weights_folder: The result of the stage that made the weights.
        activations_folder: The result of the stage that calibrated the activations.

    Returns:
        The quantizers of the activations, and their rules, by name.

    Raises:
        UserError: if the file has no scale of a static quantizer.
    """
    activations, rules = load_weights_(pipeline, weight, activation, weights_folder / UNITS)
    load_scales_(activations, activations_folder / SCALES)
    return activations, rules


def load_weights_(
    pipeline: Pipeline, weight: Sequence[Rule], activation: Sequence[Rule], folder: Path
) -> tuple[dict[str, FakeQuantize], dict[str, Rule]]:
    """Quantize a model in place with the results of a reconstruction.

    Args:
        pipeline: The pipeline with the original model.
        weight: The rules for weights.
        activation: The rules for activations.
        folder: The folder of the reconstruction's units.

    Returns:
        The quantizers of the activations, and their rules, by name.
    """
    units = pipeline.units()  # before layers are replaced, because it may run the model
    model, context = pipeline.transformer, TimestepContext()
    context.attach(model)
    rules = assign_rules(find_layers(model), weight)
    layers = quantize_weights_(model, rules, context=context)
    activations = quantize_activations_(model, activation)
    parts = split_by_unit(layers, units)
    for number, (unit, unit_layers) in enumerate(zip(units, parts, strict=True), 1):
        load_layers(unit_layers, unit_path(folder, number, unit))
    return activations


def unit_path(folder: Path, number: int, unit: Unit) -> Path:
    """Return the file of a unit. Units are numbered from 1."""
    return folder / f"{number:03}_{unit.module}.safetensors"


def is_finished(path: Path) -> bool:
    """Return whether the file of a unit's layers exists, and its report beside it."""
    return path.exists() and path.with_suffix(".json").exists()


def save_layers(layers: Mapping[str, QuantLayer], path: Path) -> None:
    """Write the state of quantized layers to one file."""
    tensors = {}
    for name, layer in layers.items():
        for key, value in layer.state_dict().items():
            tensors[f"{name}.{key}"] = value
    with atomic_write_checksummed(path) as part:
        save_tensors(tensors, part)


def load_layers(layers: Mapping[str, QuantLayer], path: Path) -> None:
    """Load the file of `save_layers` into the layers.

    Raises:
        RuntimeError: if the file lacks a tensor of one of these layers, or has one that the layer
            does not have.
    """
    tensors = load_file(path)
    for name, layer in layers.items():
        state = {}
        for full_name, value in tensors.items():
            if full_name.startswith(f"{name}."):
                state[full_name.removeprefix(f"{name}.")] = value
        layer.load_state_dict(state)
