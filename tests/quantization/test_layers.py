"""The quantized layer against torch's own linear and convolution layers."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.numerics.format_selection import FormatSelection, LeastError
from fp4dit.numerics.formats import NumberFormat, floating, fp16, integer
from fp4dit.numerics.qparams import as_tensors
from fp4dit.numerics.quantizer import Granularity, PerChannel, PerGroup, PerTensor, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax, TwoSidedAbsMax
from fp4dit.quantization.fake_quant import FakeQuantize, TimestepFakeQuantize
from fp4dit.quantization.layers import QuantConv, QuantLayer, make_quant_layer
from fp4dit.quantization.timestep import TimestepContext
from fp4dit.rounding.adaround import adaround, adaround_scale_aware
from fp4dit.rounding.unit_files import load_layers, save_layers
from fp4dit.transforms.base import TransformSpec
from fp4dit.transforms.hadamard import Hadamard
from fp4dit.transforms.low_rank import LowRank
from fp4dit.transforms.smoothing import Smoothing, SmoothingSearch

E2M1, INT8, UINT4 = floating(2, 1), integer(8), integer(4, signed=False)


def make_quantizer(fmt: NumberFormat, granularity: Granularity = PerChannel()) -> Quantizer:
    return Quantizer(fmt, granularity, AbsMax(fp16) if fmt.min else MinMax(fp16))


def make_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 12, bias).to(dtype)


def make_conv(channels: int = 4, **options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, 8, **options)


LAYERS = [
    (lambda: make_linear(), (2, 5, 32)),
    (lambda: make_conv(kernel_size=2, stride=2), (2, 4, 8, 8)),
]
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
    layer = make_quant_layer(make(), make_quantizer(fmt)).prepare()
    original = layer.weight.clone()
    layer.commit_weight()
    once = layer.weight.clone()
    layer.commit_weight()
    assert torch.equal(layer.weight, once)
    assert not torch.equal(once, original)
    codes = layer.weight_fake_quant.qparams.to_grid(layer.weight_matrix)
    nearest_code = (codes[..., None] - fmt.values()).abs().amin(-1)
    assert nearest_code.max() < 1e-4
    assert (
        (once - original).flatten(1).abs()
        <= layer.weight_fake_quant.qparams.scale * fmt.max / 4 * 1.01
    ).all()


@layers
def test_wrapping_alone_changes_nothing(make, shape):
    source, x = make(), torch.randn(shape)
    torch.testing.assert_close(
        make_quant_layer(source, make_quantizer(E2M1)).prepare()(x), source(x)
    )


@layers
@pytest.mark.parametrize("learner", [adaround, adaround_scale_aware])
@pytest.mark.parametrize("fmt", [E2M1, UINT4], ids=lambda f: f.name)
def test_untrained_learning_then_freezing_is_rounding_to_nearest(
    make, shape, learner, fmt: NumberFormat
):
    x, plain, learning = (
        torch.randn(shape),
        make_quant_layer(make(), make_quantizer(fmt)).prepare(),
        make_quant_layer(make(), make_quantizer(fmt)).prepare(),
    )
    learning.start_learning(learner)
    scaling = learning.weight_fake_quant.qparams
    clipped = scaling.from_grid(scaling.to_grid(plain.weight_matrix).clamp(fmt.min, fmt.max))
    hard = learning(x)
    learning.use_soft_weight(None)
    torch.testing.assert_close(learning.current_weight().flatten(1), clipped)
    plain.commit_weight()
    learning.commit_weight()
    assert learning.learnable_rounding is None
    assert torch.equal(learning(x), plain(x))
    torch.testing.assert_close(hard, plain(x))


def test_bf16_weights_freeze_to_nearest_and_stay():
    plain, learning = (
        make_quant_layer(
            make_linear(dtype=torch.bfloat16), make_quantizer(E2M1, PerGroup(16))
        ).prepare()
        for _ in range(2)
    )
    learning.start_learning(adaround_scale_aware)
    plain.commit_weight()
    learning.commit_weight()
    assert plain.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, learning.weight)
    once = plain.weight.clone()
    plain.commit_weight()
    assert torch.equal(plain.weight, once)


def test_gradients_reach_the_rounding_and_nothing_else():
    layer = make_quant_layer(make_linear(), make_quantizer(E2M1)).prepare()
    rounding = layer.start_learning(adaround)
    layer.use_soft_weight(None)
    layer(torch.randn(3, 32)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == [
        "learnable_rounding.v"
    ]
    assert rounding.v.grad.abs().sum() > 0


def test_soft_weight_has_the_dtype_and_values_of_autocast():
    """Products and gradients, beside those of the fp32 weight which autocast casts itself."""
    layer, x = make_quant_layer(make_linear(), make_quantizer(E2M1)).prepare(), torch.randn(3, 32)
    rounding = layer.start_learning(adaround)
    with torch.autocast("cpu", torch.bfloat16):
        layer.use_soft_weight(None)
        ours = layer(x)
        theirs = F.linear(x, rounding.soft_weight()[0].view_as(layer.weight_matrix), layer.bias)
    assert layer.soft_weight.dtype == ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
    assert torch.equal(
        *(torch.autograd.grad(y.float().square().sum(), rounding.v)[0] for y in (ours, theirs))
    )
    assert layer(x).dtype == torch.float32  # where autocast is off


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["patch", "same", "odd"])
def test_unfolded_convolution_equals_torch(options: dict, bias: bool):
    layer, x = (
        make_quant_layer(make_conv(**options, bias=bias), make_quantizer(E2M1)),
        torch.randn(2, 4, 9, 11),
    )
    layer.input_fake_quant = PassThrough()
    assert isinstance(layer, QuantConv)
    source = layer.source
    expected = F.conv2d(
        x, source.weight, source.bias, source.stride, source.padding, source.dilation
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_token_of_a_patch_convolution_is_its_patch():
    layer, x = (
        make_quant_layer(make_conv(kernel_size=2, stride=2), make_quantizer(E2M1)),
        torch.randn(1, 4, 8, 8),
    )
    layer.input_fake_quant = FakeQuantize(make_quantizer(INT8))
    louder = x.clone()
    louder[..., :2, :2] *= 1000  # the first patch
    changed = (layer(louder) != layer(x)).any(1)[0]
    assert changed.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_and_with_bias_and_quantized_input(bias: bool):
    layer, x = make_quant_layer(make_linear(bias), make_quantizer(E2M1)), torch.randn(2, 5, 32)
    layer.input_fake_quant = FakeQuantize(make_quantizer(INT8))
    layer.commit_weight()
    expected = F.linear(
        make_quantizer(INT8)(x),
        make_quantizer(E2M1)(make_linear(bias).weight),
        make_linear(bias).bias,
    )
    assert torch.equal(layer(x), expected)


@layers
def test_everything_moves_with_the_module(make, shape):
    """A tensor that is forgotten stays on the CPU: moving to meta finds it without a GPU."""
    layer = make_quant_layer(make(), make_quantizer(UINT4)).prepare()
    layer.input_fake_quant = FakeQuantize(Quantizer(INT8, PerTensor()))
    layer.input_fake_quant.calibrate(torch.randn(shape))
    layer.start_learning(adaround_scale_aware)
    layer.to("meta")
    plain_tensors = {
        name: t for m in layer.modules() for name, t in vars(m).items() if isinstance(t, Tensor)
    }
    tensors = [
        *layer.parameters(),
        *layer.buffers(),
        *plain_tensors.values(),
        *as_tensors(layer.input_fake_quant.qparams).values(),
    ]
    assert len(tensors) >= 9
    assert all(t.is_meta for t in tensors)
    assert layer(torch.randn(shape, device="meta")).is_meta


def test_state_dict_holds_hard_weights_and_scales_alone():
    layer, again = (
        make_quant_layer(make_linear(), make_quantizer(UINT4)).prepare(),
        make_quant_layer(make_linear(), make_quantizer(UINT4)),
    )
    layer.start_learning(adaround)
    with torch.no_grad():
        layer.learnable_rounding.v.neg_()
    layer.commit_weight()
    assert set(layer.state_dict()) == {
        "source.weight",
        "source.bias",
        "weight_fake_quant.scale",
        "weight_fake_quant.zero",
    }
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(again(x), layer(x))
    assert isinstance(again, QuantLayer)


FP4 = [floating(3, 0), floating(2, 1), floating(1, 2)]
GRIDS = {
    "scale": make_quantizer(E2M1, PerGroup(16)),
    "affine": make_quantizer(UINT4),
    "two-sided": Quantizer(E2M1, PerChannel(), TwoSidedAbsMax()),
    "chosen for all": Quantizer(FormatSelection(FP4, LeastError()), PerChannel()),
    "chosen per block": Quantizer(FormatSelection(FP4, LeastError(), per="block"), PerGroup(16)),
}
grids = pytest.mark.parametrize("of", GRIDS.values(), ids=GRIDS.keys())


def mixed_rows() -> Tensor:
    """Rows as different as uniform and long-tailed values, so that no one format suits all."""
    g = torch.Generator().manual_seed(0)
    return torch.cat([torch.rand(4, 32, generator=g) - 0.5, torch.randn(4, 32, generator=g) ** 5])


def test_static_fake_quantize_does_nothing_before_calibration():
    small, large, of = (
        torch.randn(3, 32),
        100 * torch.randn(3, 32),
        Quantizer(INT8, PerTensor()),
    )
    dynamic, static = FakeQuantize(of), FakeQuantize(of, static=True)
    assert torch.equal(dynamic(large), of(large))
    assert static(small) is small
    static.calibrate(large)
    assert torch.equal(static(small), of(small, of.compute_qparams(large)))
    assert not torch.equal(static(small), dynamic(small))


def test_a_dynamic_quantizer_takes_the_best_format_per_block():
    x, granularity = mixed_rows(), PerGroup(16)
    error = lambda y: (x - y).square().view(-1, 16).sum(1)
    single = torch.stack([error(Quantizer(fmt, granularity)(x)) for fmt in FP4])
    chosen = error(
        FakeQuantize(Quantizer(FormatSelection(FP4, LeastError(), per="block"), granularity))(x)
    )
    assert len(single.argmin(0).unique()) > 1
    torch.testing.assert_close(chosen, single.amin(0), rtol=0, atol=0)


@grids
def test_a_grid_comes_back_from_its_state_dict_in_a_fresh_one(of: Quantizer):
    grid, again, x = FakeQuantize(of), FakeQuantize(of), mixed_rows()
    grid.calibrate(x)
    again.load_state_dict(grid.state_dict())
    assert torch.equal(again(x), grid(x))
    assert again.format.name == grid.format.name
    assert (grid(x) - x).square().sum() < 0.2 * x.square().sum()
    again.load_state_dict(grid.state_dict())  # into one that holds something
    assert torch.equal(again(x), grid(x))


@grids
def test_calibrated_qparams_move_with_the_module(of: Quantizer):
    grid = FakeQuantize(of, static=True)
    grid.calibrate(mixed_rows())
    grid.to("meta")
    assert grid.calibrated_tensors()
    assert all(t.is_meta for t in grid.calibrated_tensors().values())


def test_blocks_take_the_formats_that_they_would_take_alone():
    of, x = GRIDS["chosen per block"], mixed_rows()
    grid = FakeQuantize(of)
    grid.calibrate(x)
    candidates = [Quantizer(fmt, of.granularity)(x).view(-1, 16) for fmt in FP4]
    errors = torch.stack([(c - x.view(-1, 16)).square().sum(1) for c in candidates])
    assert len(errors.argmin(0).unique()) > 1
    expected = torch.stack(candidates)[errors.argmin(0), torch.arange(16)]
    torch.testing.assert_close(grid(x).view(-1, 16), expected)


TIMED = [
    Quantizer(UINT4, PerTensor(), MinMax()),
    GRIDS["chosen for all"],
    GRIDS["two-sided"],
]


@pytest.mark.parametrize("of", TIMED, ids=["affine", "chosen", "two-sided"])
def test_timesteps_use_their_own_or_the_nearest_qparams(of: Quantizer):
    context = TimestepContext()
    grid, again = TimestepFakeQuantize(of, context), TimestepFakeQuantize(of, context)
    values = {900.0: mixed_rows(), 500.0: 7 * mixed_rows().flip(0), 100.0: mixed_rows() + 0.2}
    for _ in range(2):  # measuring again is measuring anew
        grid.calibrate_per_timestep(values)
    again.load_state_dict(grid.state_dict())
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    nearest = {
        900.0: 900.0,
        1000.0: 900.0,
        701.0: 900.0,
        699.0: 500.0,
        301.0: 500.0,
        299.0: 100.0,
        0.0: 100.0,
    }
    for now, measured in nearest.items():
        alone = FakeQuantize(of)
        alone.calibrate(values[measured])
        context.update(torch.tensor([now, now]))
        assert torch.equal(grid(x), alone(x)), now
        assert torch.equal(again(x), alone(x)), now
        assert grid.format.name == alone.format.name
    assert (
        len(
            {
                tuple(part[t].flatten().tolist())
                for part in [grid.state_dict()["timesteps"]]
                for t in range(3)
            }
        )
        == 3
    )


def test_a_clock_follows_the_calls_of_its_model():
    class Model(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> list[float]:
            return context.timestep.tolist()

    context, model = TimestepContext(), Model()
    context.attach(model)
    assert [model(torch.zeros(2), timestep=torch.tensor([t, 7])) for t in (901, 13)] == [
        [901.0, 7.0],
        [13.0, 7.0],
    ]


CHAINS = [
    [Smoothing()],
    [SmoothingSearch(3), LowRank(2, iterations=3)],
    [Smoothing(), Hadamard(), LowRank(2)],
    [Hadamard(16), LowRank(2)],
]
chains = pytest.mark.parametrize("chain", CHAINS, ids=str)


def inputs_with_outliers(n: int = 6) -> Tensor:
    """Inputs with two large channels."""
    return torch.randn(n, 5, 32, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [9.0] * 2 + [1.0] * 30
    )


@chains
@pytest.mark.parametrize(
    "of", [make_quantizer(E2M1), GRIDS["chosen for all"]], ids=["format", "chosen"]
)
def test_prepared_transforms_leave_the_unquantized_answer(
    chain: list[TransformSpec], of: Quantizer
):
    x, source = inputs_with_outliers(), make_linear()
    layer = make_quant_layer(make_linear(), of, chain).prepare(x)
    assert not torch.allclose(layer.weight, source.weight, atol=1e-3)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    layer.commit_weight()
    error = (layer(x) - source(x)).square().sum() / source(x).square().sum()
    assert 1e-6 < error < 0.1


@chains
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=["patch", "same", "odd"])
def test_prepared_transforms_leave_the_answer_of_a_convolution(
    chain: list[TransformSpec], options: dict
):
    """They are those of its patches."""
    source, x = (
        make_conv(16, **options),
        torch.randn(6, 16, 9, 11) * torch.tensor([9.0] + [1.0] * 15).view(16, 1, 1),
    )
    layer = make_quant_layer(make_conv(16, **options), make_quantizer(E2M1), chain).prepare(x)
    assert not torch.allclose(layer.weight, source.weight, atol=1e-3)
    torch.testing.assert_close(layer(x), source(x), rtol=1e-4, atol=1e-4)
    layer.commit_weight()
    assert 1e-6 < (layer(x) - source(x)).square().sum() / source(x).square().sum() < 0.1


@chains
def test_layer_with_transforms_and_static_input_reloads_exactly(
    chain: list[TransformSpec], tmp_path: Path
):
    def make_layer() -> QuantLayer:
        layer = make_quant_layer(make_linear(), make_quantizer(UINT4, PerGroup(16)), chain)
        layer.input_fake_quant = FakeQuantize(
            Quantizer(FormatSelection(FP4, LeastError()), PerTensor()), static=True
        )
        return layer

    x, layers, again = (
        inputs_with_outliers(),
        {"a.1": make_layer(), "a.10": make_layer()},
        {"a.1": make_layer(), "a.10": make_layer()},
    )
    for shift, layer in enumerate(layers.values()):
        layer.prepare(x + shift)
        layer.commit_weight()
    save_layers(layers, tmp_path / "layers.safetensors")
    with torch.no_grad():
        for layer in again.values():
            layer.weight.zero_()
    load_layers(again, tmp_path / "layers.safetensors")
    assert all(torch.equal(again[name](x), layer(x)) for name, layer in layers.items())
    assert not torch.equal(again["a.1"](x), again["a.10"](x))


def test_static_input_is_calibrated_after_the_transforms():
    x, of = inputs_with_outliers(), Quantizer(INT8, PerTensor())
    layer = make_quant_layer(make_linear(), make_quantizer(E2M1), [Smoothing(), Hadamard()])
    layer.input_fake_quant = FakeQuantize(of, static=True)
    layer.prepare(x)
    behind = x
    for transform in layer.transforms:
        behind = transform.transform_input(behind)
    assert layer.input_fake_quant.qparams.scale.item() == pytest.approx(
        behind.abs().max().item() / 127
    )
    torch.testing.assert_close(layer.prepare_input(x)[0], of(behind))


def test_static_input_of_a_convolution_is_calibrated_on_patches():
    layer, x = (
        make_quant_layer(make_conv(kernel_size=2, stride=2), make_quantizer(E2M1)),
        torch.randn(3, 4, 8, 6),
    )
    layer.input_fake_quant = FakeQuantize(Quantizer(INT8, PerTensor()), static=True)
    assert layer.prepare(x).needs_calibration_inputs
    assert layer.input_fake_quant.qparams.scale.item() == pytest.approx(x.abs().max().item() / 127)
    assert layer.to_tokens(x).shape == (3, 12, 16)
