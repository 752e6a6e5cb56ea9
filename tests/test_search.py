"""Scales by what layers are given: against searches written out by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fp4dit.calls import Call
from fp4dit.choice import Choice, LeastError
from fp4dit.errors import UserError
from fp4dit.examples import Examples
from fp4dit.formats import Format, floating, integer, nf4
from fp4dit.grid import Grid
from fp4dit.layer import QuantLayer, wrap
from fp4dit.observers import ChannelRange
from fp4dit.policy import Rule, quantize_inputs_
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.scales import AbsMax, MinError, MinMax, PreShift, ScaleRule
from fp4dit.stream import Unit
from fp4dit.tasks.reconstruct import Rounded
from fp4dit.tasks.search import BiasMultiples, Candidates, Linear, OutputSearch, Weighed
from tests import tiny

E2M1 = floating(2, 1)
ANY_FP4 = Choice([floating(3, 0), E2M1, floating(1, 2)], LeastError())
STATIC = Quantizer(ANY_FP4, Granularity("tensor"))
SHIFTED = Quantizer(ANY_FP4, Granularity("channel"), PreShift(3))
K, OUT = 32, 12


def tokens() -> Tensor:
    """64 calls of 4 correlated tokens, with a few large channels."""
    g = torch.Generator().manual_seed(0)
    mixed = torch.randn(64, 4, 8, generator=g) @ torch.randn(8, K, generator=g)
    return mixed * torch.where(torch.arange(K) % 11 == 0, 6.0, 1.0)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, OUT)


def layer_and_examples(weight: Quantizer, activation: Quantizer | None = None) -> tuple[QuantLayer, Examples]:
    source, x = linear(), tokens()
    unit = Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",))
    examples = Examples(unit, {"x": x}, {"y": source(x).detach()}, torch.arange(48))
    layer = wrap(source, weight)
    if activation:
        quantize_inputs_({"": layer}, [Rule("*", activation, observe=ChannelRange())])
    return layer.prepare(x[:48]), examples


def error(layer: QuantLayer, examples: Examples) -> float:
    """As the layer will be: hard weights, quantized input, on the rows to learn from."""
    x, target = examples.inputs["x"][:48], examples.targets["y"][:48]
    entering = layer.enter(x)[0]
    return (entering @ layer.grid(layer.rows).T + layer.bias - target).square().sum().item()


def search(**options) -> Callable:
    return lambda layer, examples: OutputSearch(tokens=10**6, **options)(layer, [layer], examples, tiny.trainer())


WEIGHTS = {
    "row": Quantizer(E2M1, Granularity("row")),
    "group": Quantizer(E2M1, Granularity("group", 8)),
    "tensor": Quantizer(ANY_FP4, Granularity("tensor")),
    "affine": Quantizer(integer(4, signed=False), Granularity("row"), MinMax()),
    "searched": Quantizer(ANY_FP4, Granularity("row"), MinError(AbsMax(), lowest=0.4, candidates=7)),
}


def test_weighing_what_is_not_searched_is_refused():
    plain, searched = (
        wrap(linear(), Quantizer(E2M1, Granularity("row"), rule)) for rule in (AbsMax(), MinError(AbsMax()))
    )
    Weighed().check([plain, searched])
    with pytest.raises(UserError, match="would change nothing"):
        Weighed().check([plain])


@pytest.mark.parametrize("activation", [None, STATIC, SHIFTED], ids=["weights alone", "static", "shifted"])
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("candidates", [Linear(0.3, 1.2, 10), BiasMultiples(count=10)], ids=["linear", "bias"])
def test_the_error_never_grows_and_mostly_falls(
    weight: Quantizer, activation: Quantizer | None, candidates: Candidates
):
    layer, examples = layer_and_examples(weight, activation)
    start = error(layer, examples)
    search(candidates=candidates, rounds=2)(layer, examples)
    # The sums differ in their order, so that equal settings need not give equal sums.
    assert error(layer, examples) <= start * (1 + 1e-4)
    if isinstance(candidates, Linear):
        assert error(layer, examples) < 0.97 * start
    frozen = layer.rows.clone()
    layer.freeze()
    assert torch.equal(layer.rows, frozen)


@pytest.mark.parametrize("fmt", [E2M1, ANY_FP4], ids=["one format", "several"])
def test_weight_scales_are_those_of_a_brute_force(fmt: Format | Choice):
    ratios = torch.linspace(0.4, 1.1, 6).tolist()
    layer, examples = layer_and_examples(Quantizer(fmt, Granularity("row")))
    x, w = examples.inputs["x"][:48].flatten(0, 1).double(), layer.rows.double()
    found = []
    for one in fmt.formats if isinstance(fmt, Choice) else [fmt]:
        scales = torch.stack([w.abs().amax(1) * ratio / one.max for ratio in [1.0, *ratios]])  # [candidates, out]
        hats = [one.nearest(w / s[:, None]) * s[:, None] for s in scales]
        errors = torch.stack([(x @ (hat - w).T).square().sum(0) for hat in hats])
        best = errors.argmin(0)
        found.append((errors.amin(0).sum().item(), one, scales[best, torch.arange(OUT)]))
    _, wanted, scales = min(found, key=lambda one: one[0])
    search(candidates=Linear(0.4, 1.1, 6), rounds=1)(layer, examples)
    assert layer.grid.format == wanted
    torch.testing.assert_close(layer.grid.scaling.scale[:, 0].double(), scales, rtol=1e-6, atol=0)


def test_channels_are_shifted_by_powers_of_two_up_to_the_span():
    layer, examples = layer_and_examples(WEIGHTS["row"], SHIFTED)
    search(candidates=Linear(0.5, 1.2, 8))(layer, examples)
    scale = layer.activation.scaling.scale
    assert scale.shape == (1, K)
    shifts = (scale.max() / scale).log2()
    assert torch.equal(shifts, shifts.round())
    assert shifts.min() == 0
    assert 1 <= shifts.max() <= 3
    unshifted, _ = layer_and_examples(WEIGHTS["row"], STATIC)
    search(candidates=Linear(0.5, 1.2, 8))(unshifted, examples)
    assert error(layer, examples) < error(unshifted, examples)


def test_a_few_tokens_are_spread_over_all_calls_and_unquantized():
    layer, examples = layer_and_examples(WEIGHTS["row"], STATIC)
    [sampled] = OutputSearch(tokens=24, batch=16).sampled(layer, [layer], examples)
    assert sampled
    everything, (found, ends) = examples.inputs["x"][:48].flatten(0, 1), sampled
    assert torch.equal(ends, torch.stack([everything.amin(0), everything.amax(0)]))
    where = (found[:, None] == everything).all(2).nonzero()[:, 1]
    assert len(where) == len(found) == 24
    assert (where // 64).bincount().tolist() == [8, 8, 8]  # of each batch as many
    assert len((where % 4).unique()) == 4  # all of a call's tokens have their turn
    assert isinstance(layer.activation, Grid)


class TwoOfThree(nn.Module):
    """Two layers after one another, and one that no call reaches."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = (wrap(nn.Linear(K, K), quantizer).prepare() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


@pytest.mark.parametrize("unit", ["row", "group"])
@pytest.mark.parametrize("base", [AbsMax(), MinMax()], ids=["scale", "affine"])
def test_weighed_scales_are_a_search_with_mean_squares_as_importance(unit: str, base: ScaleRule):
    fmt = E2M1 if isinstance(base, AbsMax) else integer(4, signed=False)
    rule = MinError(base, p=2.0, lowest=0.3, candidates=15)
    module, x = TwoOfThree(Quantizer(fmt, Granularity(unit, 8), rule)), tokens()
    layers = [module.first, module.second, module.idle]
    weights = [layer.rows.clone() for layer in layers]
    before = [layer.grid(layer.rows) for layer in layers]
    inner = module.first(x[:48]).tanh()
    examples = Examples(Unit("", ("x",), lambda s: Call((s["x"],), {}), ("y",)), {"x": x}, {"y": x}, torch.arange(48))
    assert Weighed(Rounded(), batch=11)(module, layers, examples, tiny.trainer()) == []
    for layer, w, given, unweighed in zip(layers, weights, (x[:48], inner, None), before, strict=True):
        blocks = layer.grid.quantizer.granularity.split(w)
        if given is None:
            assert torch.equal(layer.rows, unweighed)
            continue
        power = given.flatten(0, 1).square().mean(0).expand(K, K).reshape(blocks.shape)
        scaling = rule(blocks, fmt, power)
        expected = scaling.from_grid(fmt.nearest(scaling.to_grid(blocks))).view(K, K)
        torch.testing.assert_close(layer.rows, expected)
    assert not torch.equal(module.first.rows, before[0])


# The ranges that design/methods.md states, section 2: what multiples 0.01 to 1.2 of the bias amount to in E2M1.
STATED = {0.05: (0.018, 11.4), 0.5: (0.275, 11.6), 5.0: (4.24, 11.9), 50.0: (12.2, 65.4)}


@pytest.mark.parametrize(("largest", "ends"), STATED.items(), ids=str)
def test_multiples_of_the_bias_reach_as_far_as_stated(largest: float, ends: tuple[float, float]):
    tried = torch.cat(list(BiasMultiples()(torch.tensor([largest]), E2M1)))
    assert len(tried) == 100
    assert (tried.min().item(), tried.max().item()) == pytest.approx(ends, rel=0.02)
    steps = (tried[1:] / tried[:-1]).log2()
    torch.testing.assert_close(steps, steps[:1].expand(99), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "fmt", [E2M1, floating(3, 0), floating(4, 3), floating(2, 2, signed=False)], ids=lambda f: f.name
)
def test_one_times_the_bias_is_the_range_itself(fmt: Format):
    [same] = BiasMultiples(lowest=1.0, highest=2.0, count=1)(torch.tensor([0.3, 7.0]), fmt)
    torch.testing.assert_close(same, torch.tensor([0.3, 7.0]))


def test_a_codebook_has_no_bias_to_multiply():
    with pytest.raises(ValueError, match="nf4 has no exponent and mantissa bits"):
        list(BiasMultiples()(torch.ones(1), nf4))


def test_linear_candidates_are_evenly_spaced_shares():
    tried = torch.stack(list(Linear(0.1, 1.2, 111)(torch.tensor([2.0, 10.0]), E2M1)))
    torch.testing.assert_close(tried, torch.linspace(0.1, 1.2, 111)[:, None] * torch.tensor([2.0, 10.0]))
