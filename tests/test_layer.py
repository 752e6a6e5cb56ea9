"""The quantized layer against torch's own linear and convolution layers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fp4dit.formats import NumberFormat, floating, fp16, integer
from fp4dit.layer import Activation, QuantConv, QuantLayer, wrap
from fp4dit.quantizer import Granularity, Quantizer
from fp4dit.rounding import logit, ulp
from fp4dit.scales import AbsMax, MinMax, parts

E2M1, INT8, UINT4 = floating(2, 1), integer(8), integer(4, signed=False)


def quantizer(fmt: NumberFormat, unit: str = "row", group: int = 0) -> Quantizer:
    return Quantizer(fmt, Granularity(unit, group), AbsMax(fp16) if fmt.min else MinMax(fp16))


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 12, bias).to(dtype)


def conv(**options: object) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, **options)


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
    layer = wrap(make(), quantizer(fmt))
    original = layer.weight.clone()
    layer.freeze()
    once = layer.weight.clone()
    layer.freeze()
    assert torch.equal(layer.weight, once)
    assert not torch.equal(once, original)
    codes = layer.scaling.to_grid(layer.rows)
    nearest_code = (codes[..., None] - fmt.values()).abs().amin(-1)
    assert nearest_code.max() < 1e-4
    assert ((once - original).flatten(1).abs() <= layer.scaling.scale * fmt.max / 4 * 1.01).all()


@layers
def test_wrapping_alone_changes_nothing(make, shape):
    source, x = make(), torch.randn(shape)
    assert torch.equal(wrap(source, quantizer(E2M1))(x), source(x))


@layers
@pytest.mark.parametrize("learner", [logit, ulp])
@pytest.mark.parametrize("fmt", [E2M1, UINT4], ids=lambda f: f.name)
def test_untrained_learning_then_freezing_is_rounding_to_nearest(make, shape, learner, fmt: NumberFormat):
    x, plain, learning = torch.randn(shape), wrap(make(), quantizer(fmt)), wrap(make(), quantizer(fmt))
    rounding, scaling = learning.learn(learner), learning.scaling
    clipped = scaling.from_grid(scaling.to_grid(plain.rows).clamp(fmt.min, fmt.max))
    torch.testing.assert_close(learning.current().flatten(1), clipped)
    rounding.eval()
    hard = learning(x)
    plain.freeze()
    learning.freeze()
    assert learning.rounding is None
    assert torch.equal(learning(x), plain(x))
    torch.testing.assert_close(hard, plain(x))


def test_bf16_weights_freeze_to_nearest_and_stay():
    plain, learning = (wrap(linear(dtype=torch.bfloat16), quantizer(E2M1, "group", 16)) for _ in range(2))
    learning.learn(ulp)
    plain.freeze()
    learning.freeze()
    assert plain.weight.dtype == torch.bfloat16
    assert torch.equal(plain.weight, learning.weight)
    once = plain.weight.clone()
    plain.freeze()
    assert torch.equal(plain.weight, once)


def test_gradients_reach_the_rounding_and_nothing_else():
    layer = wrap(linear(), quantizer(E2M1))
    rounding = layer.learn(logit)
    layer(torch.randn(3, 32)).square().sum().backward()
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["rounding.v"]
    assert rounding.v.grad.abs().sum() > 0


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
    layer.activation = Activation(quantizer(INT8))
    louder = x.clone()
    louder[..., :2, :2] *= 1000  # the first patch
    changed = (layer(louder) != layer(x)).any(1)[0]
    assert changed.nonzero().tolist() == [[0, 0]]


@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_and_with_bias_and_quantized_input(bias: bool):
    layer, x = wrap(linear(bias), quantizer(E2M1)), torch.randn(2, 5, 32)
    layer.activation = Activation(quantizer(INT8))
    layer.freeze()
    expected = F.linear(quantizer(INT8)(x), quantizer(E2M1)(linear(bias).weight), linear(bias).bias)
    assert torch.equal(layer(x), expected)


@layers
def test_everything_moves_with_the_module(make, shape):
    """A tensor that is forgotten stays on the CPU: moving to meta finds it without a GPU."""
    layer = wrap(make(), quantizer(UINT4))
    layer.activation = Activation(Quantizer(INT8, Granularity("tensor")))
    layer.activation.scaling = layer.activation.quantizer.scaling(torch.randn(shape))
    layer.learn(ulp)
    layer.to("meta")
    own = {name: t for m in layer.modules() for name, t in vars(m).items() if isinstance(t, Tensor)}
    held = [*layer.parameters(), *layer.buffers(), *own.values(), *parts(layer.activation.scaling).values()]
    assert len(held) >= 9
    assert all(t.is_meta for t in held)
    assert layer(torch.randn(shape, device="meta")).is_meta


def test_state_dict_holds_hard_weights_and_scales_alone():
    layer, again = wrap(linear(), quantizer(UINT4)), wrap(linear(), quantizer(UINT4))
    layer.learn(logit)
    with torch.no_grad():
        layer.rounding.v.neg_()
    layer.freeze()
    assert set(layer.state_dict()) == {"source.weight", "source.bias", "weight_scale", "weight_zero"}
    again.load_state_dict(layer.state_dict())
    x = torch.randn(3, 32)
    assert torch.equal(again(x), layer(x))
    assert isinstance(again, QuantLayer)
