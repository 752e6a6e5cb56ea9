"""Presets of published methods compute what the formulas of their authors' code compute."""

from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

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
