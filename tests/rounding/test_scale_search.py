"""Test the scale searches that use the inputs of layers against searches by brute force."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.models.blocks import Unit
from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import Format, floating, integer
from fp4dit.numerics.quantizer import (
    Granularity,
    PerChannel,
    PerGroup,
    PerInputChannel,
    PerTensor,
    Quantizer,
)
from fp4dit.numerics.scale_rules import AbsMax, MinMax, ScaleRule
from fp4dit.numerics.scale_search import MinError, PreShift
from fp4dit.quantization.apply import quantize_inputs_
from fp4dit.quantization.fake_quant import FakeQuantize
from fp4dit.quantization.layers import QuantLayer, make_quant_layer
from fp4dit.quantization.observers import PerChannelMinMaxObserver
from fp4dit.quantization.rules import Rule
from fp4dit.rounding.imatrix import ImportanceMatrix
from fp4dit.rounding.output_search import BiasMultiples, LinearGrid, OutputSearch
from fp4dit.rounding.rtn import RoundToNearest
from fp4dit.utils.calls import Call
from fp4dit.utils.errors import UserError
from tests.helpers import tiny

E2M1 = floating(2, 1)
ANY_FP4 = FormatSelection([floating(3, 0), E2M1, floating(1, 2)], LeastError())
STATIC = Quantizer(ANY_FP4, PerTensor())
SHIFTED = Quantizer(ANY_FP4, PerInputChannel(), PreShift(3))
K, OUT = 32, 12


def make_tokens() -> Tensor:
    """Return 64 calls of 4 correlated tokens, with a few large channels."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 4, 8, generator=g) @ torch.randn(8, K, generator=g)
    return mixed * torch.where(torch.arange(K) % 11 == 0, 6.0, 1.0)


def make_linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, OUT)


def make_layer_and_dataset(
    weight: Quantizer, activation: Quantizer | None = None
) -> tuple[QuantLayer, UnitDataset]:
    source, x = make_linear(), make_tokens()
    unit = Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",))
    dataset = UnitDataset(unit, {"x": x}, {"y": source(x).detach()}, torch.arange(48))
    layer = make_quant_layer(source, weight)
    if activation:
        quantize_inputs_({"": layer}, [Rule("*", activation, observer=PerChannelMinMaxObserver())])
    return layer.prepare(x[:48]), dataset


def measure_error(layer: QuantLayer, dataset: UnitDataset) -> float:
    """Return the error of a layer with hard weights and quantized input on the training rows."""
    x, target = dataset.inputs["x"][:48], dataset.targets["y"][:48]
    hard_weight = layer.weight_fake_quant(layer.weight_matrix)
    output = layer.prepare_input(x)[0] @ hard_weight.T + layer.bias
    return (output - target).square().sum().item()


def search_layer(layer: QuantLayer, dataset: UnitDataset, **options: Any) -> None:
    """Search with all tokens, and round the layer."""
    search = OutputSearch(tokens=10**6, **options)
    search.round_unit(layer, [layer], dataset, tiny.trainer())


WEIGHTS = {
    "row": Quantizer(E2M1, PerChannel()),
    "group": Quantizer(E2M1, PerGroup(8)),
    "tensor": Quantizer(ANY_FP4, PerTensor()),
    "affine": Quantizer(integer(4, signed=False), PerChannel(), MinMax()),
    "searched": Quantizer(ANY_FP4, PerChannel(), MinError(AbsMax(), lowest=0.4, candidates=7)),
}


def test_imatrix_needs_a_scale_rule_that_searches():
    plain = make_quant_layer(make_linear(), Quantizer(E2M1, PerChannel(), AbsMax()))
    searched = make_quant_layer(make_linear(), Quantizer(E2M1, PerChannel(), MinError(AbsMax())))
    ImportanceMatrix().check([plain, searched])
    with pytest.raises(UserError, match="would change nothing"):
        ImportanceMatrix().check([plain])


@pytest.mark.parametrize(
    "activation", [None, STATIC, SHIFTED], ids=["weights alone", "static", "shifted"]
)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_output_search_reduces_the_error(weight: Quantizer, activation: Quantizer | None):
    layer, dataset = make_layer_and_dataset(weight, activation)
    start = measure_error(layer, dataset)
    search_layer(layer, dataset, candidates=LinearGrid(0.3, 1.2, 10), rounds=2)
    assert measure_error(layer, dataset) < 0.97 * start
    hard_weight = layer.weight_matrix.clone()
    layer.commit_weight()
    assert torch.equal(layer.weight_matrix, hard_weight)


@pytest.mark.parametrize("fmt", [E2M1, ANY_FP4], ids=["one format", "several"])
def test_weight_scales_are_those_of_a_brute_force_search(fmt: Format | FormatSelection):
    ratios = torch.linspace(0.4, 1.1, 6).tolist()
    layer, dataset = make_layer_and_dataset(Quantizer(fmt, PerChannel()))
    x, w = dataset.inputs["x"][:48].flatten(0, 1).double(), layer.weight_matrix.double()
    trials = []
    for candidate in fmt.formats if isinstance(fmt, FormatSelection) else [fmt]:
        scales, errors = [], []
        for ratio in [1.0, *ratios]:
            scale = w.abs().amax(1) * ratio / candidate.max
            hat = candidate.nearest(w / scale[:, None]) * scale[:, None]
            scales.append(scale)
            errors.append((x @ (hat - w).T).square().sum(0))
        least, best = torch.stack(errors).min(0)
        best_scales = torch.stack(scales)[best, torch.arange(OUT)]
        trials.append((least.sum().item(), candidate, best_scales))
    _, expected_format, scales = min(trials, key=lambda trial: trial[0])
    search_layer(layer, dataset, candidates=LinearGrid(0.4, 1.1, 6), rounds=1)
    assert layer.weight_fake_quant.format == expected_format
    torch.testing.assert_close(
        layer.weight_fake_quant.qparams.scale[:, 0].double(), scales, rtol=1e-6, atol=0
    )


def test_input_channels_are_scaled_by_powers_of_two():
    layer, dataset = make_layer_and_dataset(WEIGHTS["row"], SHIFTED)
    search_layer(layer, dataset, candidates=LinearGrid(0.5, 1.2, 8))
    scale = layer.input_fake_quant.qparams.scale
    assert scale.shape == (1, K)
    shifts = (scale.max() / scale).log2()
    assert torch.equal(shifts, shifts.round())
    assert shifts.min() == 0
    assert 1 <= shifts.max() <= 3
    unshifted, _ = make_layer_and_dataset(WEIGHTS["row"], STATIC)
    search_layer(unshifted, dataset, candidates=LinearGrid(0.5, 1.2, 8))
    assert measure_error(layer, dataset) < measure_error(unshifted, dataset)


def test_sampled_tokens_are_spread_over_all_calls():
    layer, dataset = make_layer_and_dataset(WEIGHTS["row"], STATIC)
    [sample] = OutputSearch(tokens=24, batch_size=16).sample_tokens(layer, [layer], dataset)
    assert sample
    all_tokens, (sampled, extremes) = dataset.inputs["x"][:48].flatten(0, 1), sample
    assert torch.equal(extremes, torch.stack([all_tokens.amin(0), all_tokens.amax(0)]))
    # The sampled tokens are not quantized.
    positions = (sampled[:, None] == all_tokens).all(2).nonzero()[:, 1]
    assert len(positions) == len(sampled) == 24
    # Each batch has the same number, and each position within a call occurs.
    assert (positions // 64).bincount().tolist() == [8, 8, 8]
    assert len((positions % 4).unique()) == 4
    assert isinstance(layer.input_fake_quant, FakeQuantize)


class TwoOfThree(nn.Module):
    """A sequence of two layers, and an unused layer."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = make_quant_layer(nn.Linear(K, K), quantizer).prepare()
        self.second = make_quant_layer(nn.Linear(K, K), quantizer).prepare()
        self.idle = make_quant_layer(nn.Linear(K, K), quantizer).prepare()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(8)])
@pytest.mark.parametrize("base", [AbsMax(), MinMax()], ids=["scale", "affine"])
def test_imatrix_is_a_search_weighted_by_mean_squares(granularity: Granularity, base: ScaleRule):
    fmt = E2M1 if isinstance(base, AbsMax) else integer(4, signed=False)
    rule = MinError(base, p=2.0, lowest=0.3, candidates=15)
    module, x = TwoOfThree(Quantizer(fmt, granularity, rule)), make_tokens()
    layers = [module.first, module.second, module.idle]
    weights = [layer.weight_matrix.clone() for layer in layers]
    before = [layer.weight_fake_quant(layer.weight_matrix) for layer in layers]
    inner = module.first(x[:48]).tanh()
    unit = Unit("", ("x",), lambda state: Call((state["x"],), {}), ("y",))
    dataset = UnitDataset(unit, {"x": x}, {"y": x}, torch.arange(48))
    method = ImportanceMatrix(RoundToNearest(), batch_size=11)
    assert method.round_unit(module, layers, dataset, tiny.trainer()) == []
    assert torch.equal(module.idle.weight_matrix, before[2])
    for layer, w, inputs in zip(layers[:2], weights[:2], (x[:48], inner), strict=True):
        blocks = layer.weight_fake_quant.quantizer.granularity.split(w)
        power = inputs.flatten(0, 1).square().mean(0).expand(K, K).reshape(blocks.shape)
        qparams = rule(blocks, fmt, power)
        expected = qparams.from_grid(fmt.nearest(qparams.to_grid(blocks))).view(K, K)
        torch.testing.assert_close(layer.weight_matrix, expected)
    assert not torch.equal(module.first.weight_matrix, before[0])


def test_linear_candidates_are_evenly_spaced_shares():
    largest = torch.tensor([2.0, 10.0])
    candidates = torch.stack(list(LinearGrid(0.1, 1.2, 111)(largest, E2M1)))
    torch.testing.assert_close(candidates, torch.linspace(0.1, 1.2, 111)[:, None] * largest)


@pytest.mark.parametrize(("exponent", "mantissa"), [(3, 0), (2, 1), (1, 2)])
def test_bias_multiples_are_the_largest_values_of_formats_with_these_biases(
    exponent: int, mantissa: int
):
    """The largest code has all exponent and mantissa bits set. 100 multiples, the last 1.1881."""
    largest = torch.tensor([0.05, 1.0, 40.0], dtype=torch.float64)
    found = torch.stack(list(BiasMultiples()(largest, floating(exponent, mantissa))))
    bits = 2**exponent - 1, sum(2.0**-i for i in range(mantissa + 1))
    expected = []
    for number in range(100):
        multiple = 0.01 + 0.0119 * number
        biases = [bits[0] - math.log2(value / bits[1]) for value in largest.tolist()]
        expected.append([2.0 ** (bits[0] - multiple * bias) * bits[1] for bias in biases])
    wanted = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=0)
    whole = torch.stack(list(BiasMultiples(1.0, 2.0, 1)(largest, floating(exponent, mantissa))))
    torch.testing.assert_close(whole[0], largest)
