"""Resume rounding methods that round one layer after another without training."""

from collections.abc import Iterator, Sequence

from torch import nn

from fp4dit.quantization.layers import QuantLayer
from fp4dit.utils.resumable import ResumableTrainers


def iter_unfinished_layers(
    module: nn.Module, layers: Sequence[QuantLayer], trainers: ResumableTrainers
) -> Iterator[tuple[int, QuantLayer]]:
    """Load the layers that a killed run has rounded, and yield the others to be rounded.

    The layers that are rounded so far are saved, if that is due, when the next one is asked for.

    Args:
        module: The unit.
        layers: The quantized layers of the unit.
        trainers: The trainers of the unit, whose folder holds the rounded layers.

    Yields:
        The number of the layer, from 0, and the layer.
    """
    results, device = trainers.make_results(), layers[0].weight.device
    states = results.load()
    for layer, state in zip(layers, states, strict=False):
        layer.load_state_dict(state)
    module.to(device)  # what was loaded is on the CPU
    for number in range(len(states), len(layers)):
        yield number, layers[number]
        states.append(layers[number].state_dict())
        results.save(lambda: states)
