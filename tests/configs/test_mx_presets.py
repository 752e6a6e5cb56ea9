"""The presets of MX: each is bit-equal to torchao with the scales that its description names."""

from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

from pipelines.config.resolvers import CONF
from tests.conftest import Compose

ELEMENTS = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6": "fp6_e2m3",
    "mxfp8": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize(("suffix", "mode"), [("rtn", "EVEN"), ("rtn_floor", "FLOOR")])
def test_scales_are_those_of_torchao(composed: Compose, name: str, suffix: str, mode: str):
    method = f"{name}_{suffix}"
    description = (CONF / "method" / f"{method}.yaml").read_text().splitlines()[1]
    assert ("`even`" in description) == (mode == "EVEN")
    config = composed(f"method={method}")
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= 20
    scale, codes = to_mx(x, ELEMENTS[name], 32, ScaleCalculationMode[mode])
    expected = to_dtype(codes, scale, ELEMENTS[name], 32, torch.float32)
    for group in ("weight", "activation"):
        node: Any = OmegaConf.to_container(config[group], resolve=True)
        rule = instantiate(node)[-1]  # that of all layers that no other one matches
        assert rule.match == "*"
        assert torch.equal(rule.quantizer(x), expected)
