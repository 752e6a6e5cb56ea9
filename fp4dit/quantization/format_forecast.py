"""Forecast which 4-bit format of weights has the least error, from a sample of them.

Rows of each layer, evenly spaced, are rounded to nearest in each format. Blocks lie within rows, so
that a row is a fair sample of its layer. Only a scale of a whole tensor needs the whole tensor.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fp4dit.analysis.forecast import FormatForecast, FormatScore
from fp4dit.analysis.measured_noise import measure_noise, to_decibels
from fp4dit.analysis.weight_formats import BLOCK_FORMATS, make_element_quantizers
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.quantization.rules import Rule, find_layers, match_rules

SAMPLE = 2**14  # values of a layer, which are rounded in all formats in some milliseconds

METHOD = "this method"

OWN_BLOCKS = ("nvfp4", "if4", "mxfp4")

MIN_COVERAGE = 0.95  # of the weights: formats whose blocks divide fewer rows are left out

Rows = Float[Tensor, "o k"]

# A function of a layer's name and a number of rows, which returns so many rows of its weight, or
# None if the weight is not there.
RowReader = Callable[[str, int], Rows | None]


def forecast_formats(
    layers: Mapping[str, Sequence[int]], rules: Sequence[Rule], read_rows: RowReader
) -> FormatForecast | None:
    """Return the forecast for the layers that rules quantize to 4 bits.

    Transforms that are fitted to inputs are not known yet, and left out.

    Args:
        layers: The shape of the weight of each layer.
        rules: The rules for weights.
        read_rows: A reader of weights.

    Returns:
        The forecast; None if no weight is there, or none is quantized to 4 bits.

    Example:
        >>> files = WeightFiles.find("pkg://fp4dit/worlds/shapes/weights")
        >>> forecast_formats(audit.shapes, rules, files.read_rows).winner
        'nf4'
    """
    scores: dict[str, list[tuple[int, FormatScore]]] = {}
    values = read = 0
    for name, rule in match_rules(layers, rules).items():
        if rule.quantizer is None or rule.quantizer.format.bits != 4:
            continue
        shape = torch.Size([layers[name][0], torch.Size(layers[name][1:]).numel()])
        rows = read_rows(name, count_rows(rule.quantizer, shape))
        if rows is None:
            continue
        values, read = values + shape.numel(), read + rows.numel()
        rows = apply_known_transforms(rule, rows, shape)
        for key, score in score_formats(rule.quantizer, rows, shape).items():
            scores.setdefault(key, []).append((shape.numel(), score))
    return collect_forecast(scores, values, read) if values else None


def collect_forecast(
    scores: Mapping[str, Sequence[tuple[int, FormatScore]]], values: int, read: int
) -> FormatForecast:
    """Return the forecast from the scores of single layers.

    Args:
        scores: The number of values and the score of each layer, by format.
        values: The number of values of all layers.
        read: How many of them were read.
    """
    means = {}
    for name, layers in scores.items():
        if sum(size for size, _ in layers) >= MIN_COVERAGE * values:
            means[name] = average_scores(layers)
    method = means.pop(METHOD)
    own = {name: means.pop(name) for name in OWN_BLOCKS if name in means}
    return FormatForecast(means, own, method, read / values)


def forecast_from_module(model: nn.Module, rules: Sequence[Rule]) -> FormatForecast | None:
    """Return the forecast for a model in memory."""
    weights: dict[str, Tensor] = {}
    for name, layer in find_layers(model).items():
        weight = getattr(layer, "weight", None)  # a packed layer has none
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta:
            weights[name] = weight

    def read_rows(name: str, count: int) -> Rows | None:
        weight = weights[name]
        index = torch.tensor(space_evenly(len(weight), count))
        return weight.detach()[index.to(weight.device)].flatten(1).float()

    return forecast_formats({name: w.shape for name, w in weights.items()}, rules, read_rows)


def count_rows(quantizer: Quantizer, shape: torch.Size) -> int:
    """Return how many rows of a layer are a sample of it."""
    rows, length = shape
    if quantizer.granularity.width(shape) > length:
        return rows
    return max(1, SAMPLE // length)


def apply_known_transforms(rule: Rule, rows: Rows, shape: torch.Size) -> Rows:
    """Return rows of a weight after those transforms of a rule that are not fitted to a layer."""
    for spec in rule.transforms:
        transform = spec(*shape)
        if not transform.needs_inputs and not transform.needs_weight:
            rows = transform.transform_weight(rows)
    return rows


def score_formats(method: Quantizer, rows: Rows, shape: torch.Size) -> dict[str, FormatScore]:
    """Return the score of each format on rows of a layer.

    Args:
        method: The quantizer of the method, whose blocks most formats are given.
        rows: The rows.
        shape: The shape of the whole weight.
    """
    quantizers = {METHOD: method, **make_element_quantizers(method.granularity)}
    for name in OWN_BLOCKS:
        granularity = BLOCK_FORMATS[name].granularity
        assert isinstance(granularity, PerGroup)
        if shape[1] % granularity.size == 0:
            quantizers[name] = BLOCK_FORMATS[name]
    power = max(rows.square().sum(dtype=torch.float64).item(), 1e-300)
    scores = {}
    for name, quantizer in quantizers.items():
        noise = max(measure_noise(quantizer, rows) / power, 1e-30)
        scores[name] = FormatScore(to_decibels(noise), quantizer.bits_per_value(shape))
    return scores


def average_scores(layers: Sequence[tuple[int, FormatScore]]) -> FormatScore:
    """Return the score of several layers: the means of noise and bits, by numbers of values."""
    total = sum(size for size, _ in layers)
    noise = sum(size * 10 ** (-score.ratio / 10) for size, score in layers) / total
    return FormatScore(to_decibels(noise), sum(s * score.bits for s, score in layers) / total)


def space_evenly(length: int, count: int) -> list[int]:
    """Return up to `count` numbers below `length`, in the middle of equal parts.

    >>> space_evenly(100, 2)
    [25, 75]
    """
    count = min(count, length)
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]
