"""Presets of published methods compute what the formulas of their authors' code compute."""

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from fp4dit.numerics.formats import floating
from fp4dit.numerics.qparams import Affine, Scale
from fp4dit.quantization import apply
from fp4dit.quantization.rules import Rule, assign_rules, find_layers
from tests.conftest import Compose


def compose_rule(composed: Compose, method: str, group: str) -> Rule:
    """Return the rule of all layers that no other rule of the preset matches."""
    node: Any = OmegaConf.to_container(composed(f"method={method}")[group], resolve=True)
    rule = instantiate(node)[-1]
    assert rule.match == "*"
    return rule


def test_smoothquant(composed: Compose):
    """`smooth_ln_fcs` and `W8A8Linear` of smoothquant at c61476d, per channel and per token."""
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 32), torch.randn(4, 16, 48) * (1 + 20 * (torch.arange(48) % 16 == 3))
    x[..., 5] *= 1e-12  # its factor would be below 1e-5
    # Theirs: the model, and with it factors and scales of weights, are in fp16.
    s = x.abs().amax((0, 1)).pow(0.5) / linear.weight.abs().amax(0).clamp(min=1e-5).pow(0.5)
    s = s.clamp(min=1e-5).half().float()

    def round_rows(values: Tensor, dtype: torch.dtype) -> Tensor:
        scales = (values.abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127).to(dtype).float()
        return (values / scales).round().clamp(-127, 127) * scales

    weight = round_rows(linear.weight.detach() * s, torch.float16)
    expected = nn.functional.linear(round_rows(x / s, torch.float32), weight, linear.bias)

    rows = round_rows(linear.weight.detach(), torch.float16)
    plain = nn.functional.linear(round_rows(x, torch.float32), rows, linear.bias)
    exact = linear(x).detach()
    assert (expected - exact).norm() < 0.6 * (plain - exact).norm()  # smoothing counts here

    model = nn.Sequential(linear)
    rules = [compose_rule(composed, "smoothquant", "weight")]
    layer = apply.quantize_weights_(model, assign_rules(find_layers(model), rules))["0"]
    apply.quantize_activations_(model, [compose_rule(composed, "smoothquant", "activation")])
    layer.prepare(x)
    layer.commit_weight()
    torch.testing.assert_close(model[0](x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["mr_gptq", "mr_gptq_nvfp4"])
def test_scales_of_mr_gptq(composed: Compose, method: str):
    """`Quantizer.get_quantization_params` of FP-Quant at d2e3092, with the observer `mse`."""
    quantizer = compose_rule(composed, method, "weight").quantizer
    assert quantizer is not None
    w = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    w[:, ::16] *= 5
    blocks = quantizer.granularity.split(w)
    whole = 2 * blocks.abs().amax(1, keepdim=True) / 12
    best, least = whole.clone(), torch.full_like(whole, torch.inf)
    for i in range(100):
        scale = (1 - i * 0.8 / 100) * whole
        rounded = floating(2, 1).nearest(blocks / scale) * scale
        error = (blocks - rounded).abs().pow(2.4).sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    if blocks.shape[1] == 32:  # MXFP4
        expected = 2.0 ** ((6 * best).log2().floor() - 2) * 4 / 3
    else:
        factor = 448 * 6 / w.abs().max()
        expected = (best * factor).clamp(max=448).to(torch.float8_e4m3fn).float() / factor
    clipped = (best < whole).float().mean()
    assert 0.5 < clipped < 1
    qparams = quantizer.compute_qparams(w)
    assert isinstance(qparams, Scale)
    torch.testing.assert_close(qparams.scale, expected, rtol=1e-6, atol=0)


def tune_as_autoround(w: Tensor, method: str, low: Tensor, high: Tensor, v: Tensor) -> Tensor:
    """`quant_tensor_asym`, `quant_mx` and `nv_fp4` of auto-round at b9f3d00, with min-max factors.

    Args:
        w: Weight in blocks.
        low: `min_scale` of each block.
        high: `max_scale` of each block.
        v: Shift of each value.
    """
    largest = w.abs().amax(1, keepdim=True) * high
    if method == "autoround_int4":
        least, most = w.amin(1, keepdim=True).clamp(max=0) * low, w.amax(1, keepdim=True) * high
        scale = ((most.clamp(min=0) - least) / 15).half().float()
        zero = (-least / scale).round()
        return scale * (((w / scale + v).round() + zero).clamp(0, 15) - zero)
    if method == "autoround_mxfp4":
        scale = 2.0 ** (largest.log2().floor() - 2)
    else:
        unit = 448 * 6 / w.abs().max()
        scale = (unit * largest / 6).to(torch.float8_e4m3fn).float() / unit
    return floating(2, 1).nearest((w / scale + v).clamp(-6, 6)) * scale


@pytest.mark.parametrize("method", ["autoround_int4", "autoround_mxfp4", "autoround_nvfp4"])
def test_tuned_ranges_of_autoround(composed: Compose, method: str):
    """Also with factors below 1/2."""
    quantizer = compose_rule(composed, method, "weight").quantizer
    assert quantizer is not None
    node: Any = OmegaConf.to_container(composed(f"method={method}").rounding.learner, resolve=True)
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    w[:, ::16] += 0.5
    blocks = quantizer.granularity.split(w)
    learner = instantiate(node)(blocks, quantizer.format, quantizer.compute_qparams(w))
    assert isinstance(learner.learned_qparams, Affine | Scale)
    ones = torch.ones(len(blocks), 1)
    start = tune_as_autoround(blocks, method, ones, ones, torch.zeros_like(blocks))
    torch.testing.assert_close(learner.hard_weight(), start, rtol=1e-5, atol=1e-6)
    low, high, v = (
        torch.rand(shape, generator=torch.Generator().manual_seed(i)) * span + least
        for i, shape, span, least in (
            (1, ones.shape, 0.7, 0.3),
            (2, ones.shape, 0.7, 0.3),
            (3, blocks.shape, 1.0, -0.5),
        )
    )
    with torch.no_grad():
        learner.low_factor.copy_(low)
        learner.high_factor.copy_(high)
        learner.v.copy_(v)
    expected = tune_as_autoround(blocks, method, low, high, v)
    agree = torch.isclose(learner.hard_weight(), expected, rtol=1e-5, atol=1e-6)
    assert agree.float().mean() > 0.999  # a value in the middle of two may go to either
