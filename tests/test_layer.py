"""The quantized layer against torch's own linear and convolution layers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.choice import Choice, LeastError
from fp4dit.clock import Clock
from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.grid import Grid, TimedGrid
from fp4dit.hadamard import Hadamard
from fp4dit.layer import QuantConv, QuantLayer, wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.reconstruction import load_layers, save_layers
from fp4dit.rounding import logit, ulp
from fp4dit.scales import AbsMax, MinMax, TwoSidedAbsMax
from fp4dit.scaling import parts
from fp4dit.transforms import Balance, BalanceSearch, LowRank, TransformSpec

E2M1, INT8, UINT4 = floating(2, 1), integer(8), integer(4, signed=False)


def quantizer(fmt: NumberFormat, unit: str = "row", group: int = 0) -> Quantizer:
    return Quantizer(fmt, Granularity(unit, group), AbsMax(fp16) if fmt.min else MinMax(fp16))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 12, bias).to(dtype)


def conv(channels: int = 4, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 8, **options)


LAYERS = [(lambda: linear(), (2, 5, 32)), (lambda: conv(kernel_size=2, stride=2), (2, 4, 8, 8))]
layers = pytest.mark.parametrize(("make", "shape"), LAYERS, ids=["linear", "conv"])
CONVOLUTIONS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
]


class PassThrough(nn.Module):
    """An activation module that is no Identity, and does nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@layers
@pytest.mark.parametrize("fmt", [E2M1, floating(3, 0), integer(4), UINT4], ids=lambda f: f.name)
def test_freezing_puts_weights_on_the_grid_and_is_idempotent(make, shape, fmt: NumberFormat):
    layer = wrap(make(), quantizer(fmt)).prepare()
    original = layer.weight.clone()
    layer.freeze()
    once = layer.weight.clone()
    layer.freeze()
    assert torch.equal(layer.weight, once)
    assert not torch.equal(once, original)
    codes = layer.grid.scaling.to_grid(layer.rows)
    nearest_code = (codes[..., None] - fmt.values()).abs().amin(-1)
    assert nearest_code.max() < 1e-4
    assert ((once - original).flatten(1).abs() <= layer.grid.scaling.scale * fmt.max / 4 * 1.01).all()


@layers
def test_wrapping_alone_changes_nothing(make, shape):
    source, x = make(), torch.randn(shape)
    torch.testing.assert_close(wrap(source, quantizer(E2M1)).prepare()(x), source(x))


@layers
@pytest.mark.parametrize("learner", [logit, ulp])
@pytest.mark.parametrize("fmt", [E2M1, UINT4], ids=lambda f: f.name)
def test_untrained_learning_then_freezing_is_rounding_to_nearest(make, shape, learner, fmt: NumberFormat):
    x, plain, learning = (
        torch.randn(shape),
        wrap(make(), quantizer(fmt)).prepare(),
        wrap(make(), quantizer(fmt)).prepare(),
    )
    learning.learn(learner)
    scaling = learning.grid.scaling
    clipped = scaling.from_grid(scaling.to_grid(plain.rows).clamp(fmt.min, fmt.max))
    hard = learning(x)
    learning.soften(None)
    torch.testing.assert_close(learning.current().flatten(1), clipped)
    plain.freeze()
    learning.freeze()
    assert learning.rounding is None
    assert torch.equal(learning(x), plain(x))
    torch.testing.assert_close(hard, plain(x))


def test_bf16_weights_freeze_to_nearest_and_stay():
    plain, learning = (wrap(linear(dtype=torch.bfloat16), quantizer(E2M1, "group", 16)).prepare() for _ in range(2))
    learning.learn(ulp)
    plain.freeze()
    learning.freeze()
    assert plain.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, learning.weight)
    once = plain.weight.clone()
    plain.freeze()
    assert torch.equal(plain.weight, once)


def test_gradients_reach_the_rounding_and_nothing_else():
    layer = wrap(linear(), quantizer(E2M1)).prepare()
    rounding = layer.learn(logit)
    layer.soften(None)
    layer(torch.randn(3, 32)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["rounding.v"]
    assert rounding.v.grad.abs().sum() > 0


def test_a_weight_made_in_the_dtype_of_autocast_is_the_one_that_autocast_makes():
    """Products and gradients, beside those of the fp32 weight which autocast casts itself."""
    layer, x = wrap(linear(), quantizer(E2M1)).prepare(), torch.randn(3, 32)
    rounding = layer.learn(logit)
    with torch.autocast("cpu", torch.bfloat16):
        layer.soften(None)
        ours = layer(x)
        theirs = F.linear(x, rounding.soft()[0].view_as(layer.rows), layer.bias)
    assert layer.soft.dtype == ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(y.float().square().sum(), rounding.v)[0] for y in (ours, theirs)))
    assert layer(x).dtype == torch.float32  # where autocast is off


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["patch", "same", "odd"])
def test_unfolded_convolution_equals_torch(options: dict, bias: bool):
    layer, x = wrap(conv(**options, bias=bias), quantizer(E2M1)), torch.randn(2, 4, 9, 11)
    layer.activation = PassThrough()
    assert isinstance(layer, QuantConv)
    source = layer.source
    expected = F.conv2d(x, source.weight, source.bias, source.stride, source.padding, source.dilation)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_of_a_patch_convolution_is_its_patch():
    layer, x = wrap(conv(kernel_size=2, stride=2), quantizer(E2M1)), torch.randn(1, 4, 8, 8)
    layer.activation = Grid(quantizer(INT8))
    louder = x.clone()
    louder[..., :2, :2] *= 1000  # the first patch
    changed = (layer(louder) != layer(x)).any(1)[0]
    assert changed.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_and_with_bias_and_quantized_input(bias: bool):
    layer, x = wrap(linear(bias), quantizer(E2M1)), torch.randn(2, 5, 32)
    layer.activation = Grid(quantizer(INT8))
    layer.freeze()
    expected = F.linear(quantizer(INT8)(x), quantizer(E2M1)(linear(bias).weight), linear(bias).bias)
    assert torch.equal(layer(x), expected)


@layers
def test_everything_moves_with_the_module(make, shape):
    """A tensor that is forgotten stays on the CPU: moving to meta finds it without a GPU."""
    layer = wrap(make(), quantizer(UINT4)).prepare()
    layer.activation = Grid(Quantizer(INT8, Granularity("tensor")))
    layer.activation.measure(torch.randn(shape))
    layer.learn(ulp)
    layer.to("meta")
    own = {name: t for m in layer.modules() for name, t in vars(m).items() if isinstance(t, Tensor)}
    held = [*layer.parameters(), *layer.buffers(), *own.values(), *parts(layer.activation.scaling).values()]
    assert len(held) >= 9
    assert all(t.is_meta for t in held)
    assert layer(torch.randn(shape, device="meta")).is_meta


def test_state_dict_holds_hard_weights_and_scales_alone():
    layer, again = wrap(linear(), quantizer(UINT4)).prepare(), wrap(linear(), quantizer(UINT4))
    layer.learn(logit)
    with torch.no_grad():
        layer.rounding.v.neg_()
    layer.freeze()
    assert set(layer.state_dict()) == {"source.weight", "source.bias", "grid.scale", "grid.zero"}
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(again(x), layer(x))
    assert isinstance(again, QuantLayer)


FP4 = [floating(3, 0), floating(2, 1), floating(1, 2)]
GRIDS = {
    "scale": quantizer(E2M1, "group", 16),
    "affine": quantizer(UINT4),
    "two-sided": Quantizer(E2M1, Granularity("row"), TwoSidedAbsMax()),
    "chosen for all": Quantizer(Choice(FP4, LeastError()), Granularity("row")),
    "chosen per block": Quantizer(Choice(FP4, LeastError(), per="block"), Granularity("group", 16)),
}
grids = pytest.mark.parametrize("of", GRIDS.values(), ids=GRIDS.keys())


def mixture() -> Tensor:
    """Rows as different as uniform and long-tailed values, so that no one format suits all."""
    g = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(4, 32, generator=g) - 0.5, torch.randn(4, 32, generator=g) ** 5])


def test_a_grid_is_online_and_a_static_one_waits_until_it_was_measured():
    small, large, of = torch.randn(3, 32), 100 * torch.randn(3, 32), Quantizer(INT8, Granularity("tensor"))
    online, static = Grid(of), Grid(of, static=True)
    assert torch.equal(online(large), of(large))
    assert static(small) is small
    static.measure(large)
    assert torch.equal(static(small), of(small, of.scaling(large)))
    assert not torch.equal(static(small), online(small))


def test_an_online_grid_takes_the_better_format_of_each_block():
    x, granularity = mixture(), Granularity("group", 16)
    error = lambda y: (x - y).square().view(-1, 16).sum(1)
    single = torch.stack([error(Quantizer(fmt, granularity)(x)) for fmt in FP4])
    chosen = error(Grid(Quantizer(Choice(FP4, LeastError(), per="block"), granularity))(x))
    assert len(single.argmin(0).unique()) > 1
    torch.testing.assert_close(chosen, single.amin(0), rtol=0, atol=0)


@grids
def test_a_grid_comes_back_from_its_state_dict_in_a_fresh_one(of: Quantizer):
    grid, again, x = Grid(of), Grid(of), mixture()
    grid.measure(x)
    again.load_state_dict(grid.state_dict())
    assert torch.equal(again(x), grid(x))
    assert again.format.name == grid.format.name
    assert (grid(x) - x).square().sum() < 0.2 * x.square().sum()
    again.load_state_dict(grid.state_dict())  # into one that holds something
    assert torch.equal(again(x), grid(x))


@grids
def test_a_measured_grid_moves_with_the_module(of: Quantizer):
    grid = Grid(of, static=True)
    grid.measure(mixture())
    grid.to("meta")
    assert grid.held()
    assert all(t.is_meta for t in grid.held().values())


def test_blocks_take_the_formats_that_they_would_take_alone():
    of, x = GRIDS["chosen per block"], mixture()
    grid = Grid(of)
    grid.measure(x)
    candidates = [Quantizer(fmt, of.granularity)(x).view(-1, 16) for fmt in FP4]
    errors = torch.stack([(c - x.view(-1, 16)).square().sum(1) for c in candidates])
    assert len(errors.argmin(0).unique()) > 1
    expected = torch.stack(candidates)[errors.argmin(0), torch.arange(16)]
    torch.testing.assert_close(grid(x).view(-1, 16), expected)


TIMED = [Quantizer(UINT4, Granularity("tensor"), MinMax()), GRIDS["chosen for all"], GRIDS["two-sided"]]


@pytest.mark.parametrize("of", TIMED, ids=["affine", "chosen", "two-sided"])
def test_each_timestep_has_the_scales_of_its_own_values_and_others_the_nearest_ones(of: Quantizer):
    clock = Clock()
    grid, again = TimedGrid(of, clock), TimedGrid(of, clock)
    values = {900.0: mixture(), 500.0: 7 * mixture().flip(0), 100.0: mixture() + 0.2}
    for _ in range(2):  # measuring again is measuring anew
        grid.measure_at(values)
    again.load_state_dict(grid.state_dict())
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    nearest = {900.0: 900.0, 1000.0: 900.0, 701.0: 900.0, 699.0: 500.0, 301.0: 500.0, 299.0: 100.0, 0.0: 100.0}
    for now, measured in nearest.items():
        alone = Grid(of)
        alone.measure(values[measured])
        clock.set(torch.tensor([now, now]))
        assert torch.equal(grid(x), alone(x)), now
        assert torch.equal(again(x), alone(x)), now
        assert grid.format.name == alone.format.name
    assert len({tuple(part[t].flatten().tolist()) for part in [grid.state_dict()["timesteps"]] for t in range(3)}) == 3


def test_a_clock_follows_the_calls_of_its_model():
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> list[float]:
            return clock.now.tolist()

    clock, model = Clock(), Model()
    clock.follow(model)
    assert [model(torch.zeros(2), timestep=torch.tensor([t, 7])) for t in (901, 13)] == [[901.0, 7.0], [13.0, 7.0]]


CHAINS = [
    [Balance()],
    [BalanceSearch(3), LowRank(2, iterations=3)],
    [Balance(), Hadamard(), LowRank(2)],
    [Hadamard(16), LowRank(2)],
]
chains = pytest.mark.parametrize("chain", CHAINS, ids=str)


def outliers(n: int = 6) -> Tensor:
    """Inputs with two large channels."""
    return torch.randn(n, 5, 32, generator=torch.Generator().manual_seed(3)) * torch.tensor([9.0] * 2 + [1.0] * 30)


@chains
@pytest.mark.parametrize("of", [quantizer(E2M1), GRIDS["chosen for all"]], ids=["format", "chosen"])
def test_prepared_transforms_leave_the_unquantized_answer(chain: list[TransformSpec], of: Quantizer):
    x, source = outliers(), linear()
    layer = wrap(linear(), of, chain).prepare(x)
    assert not torch.allclose(layer.weight, source.weight, atol=1e-3)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    layer.freeze()
    error = (layer(x) - source(x)).square().sum() / source(x).square().sum()
    assert 1e-6 < error < 0.1


@chains
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["patch", "same", "odd"])
def test_prepared_transforms_leave_the_answer_of_a_convolution(chain: list[TransformSpec], options: dict):
    """They are those of its patches."""
    source, x = conv(16, **options), torch.randn(6, 16, 9, 11) * torch.tensor([9.0] + [1.0] * 15).view(16, 1, 1)
    layer = wrap(conv(16, **options), quantizer(E2M1), chain).prepare(x)
    assert not torch.allclose(layer.weight, source.weight, atol=1e-3)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    layer.freeze()
    assert 1e-6 < (layer(x) - source(x)).square().sum() / source(x).square().sum() < 0.1


@chains
def test_a_layer_with_transforms_and_a_static_input_comes_back_bit_equal(chain: list[TransformSpec], tmp_path: Path):
    def made() -> QuantLayer:
        layer = wrap(linear(), quantizer(UINT4, "group", 16), chain)
        layer.activation = Grid(Quantizer(Choice(FP4, LeastError()), Granularity("tensor")), static=True)
        return layer

    x, layers, again = outliers(), {"a.1": made(), "a.10": made()}, {"a.1": made(), "a.10": made()}
    for shift, layer in enumerate(layers.values()):
        layer.prepare(x + shift)
        layer.freeze()
    save_layers(layers, tmp_path / "layers.safetensors")
    with torch.no_grad():
        for layer in again.values():
            layer.weight.zero_()
    load_layers(again, tmp_path / "layers.safetensors")
    assert all(torch.equal(again[name](x), layer(x)) for name, layer in layers.items())
    assert not torch.equal(again["a.1"](x), again["a.10"](x))


def test_a_static_input_is_measured_behind_the_transforms():
    x, of = outliers(), Quantizer(INT8, Granularity("tensor"))
    layer = wrap(linear(), quantizer(E2M1), [Balance(), Hadamard()])
    layer.activation = Grid(of, static=True)
    layer.prepare(x)
    behind = x
    for transform in layer.transforms:
        behind = transform.activation(behind)
    assert layer.activation.scaling.scale.item() == pytest.approx(behind.abs().max().item() / 127)
    torch.testing.assert_close(layer.enter(x)[0], of(behind))


def test_the_static_input_of_a_convolution_is_measured_on_its_patches():
    layer, x = wrap(conv(kernel_size=2, stride=2), quantizer(E2M1)), torch.randn(3, 4, 8, 6)
    layer.activation = Grid(Quantizer(INT8, Granularity("tensor")), static=True)
    assert layer.prepare(x).wants_inputs
    assert layer.activation.scaling.scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert layer.tokens(x).shape == (3, 12, 16)
