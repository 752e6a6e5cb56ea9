"""auto-round's own layers have the same weights, and what auto-round packed is read."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from fp4dit.numerics.formats import floating, fp16, integer
from fp4dit.numerics.quantizer import PerChannel, PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax, MinMax
from fp4dit.packed.targets.auto_round import AutoRound
from fp4dit.packed.targets.base import StoredLayer
from fp4dit.packed.targets.grid import pack_grid
from fp4dit.utils.errors import UserError
from tests.helpers.packing import make_packed_layer
from tests.packed.targets.layers import BF16, store

REASON = "auto-round is not a requirement: make test-peers installs it"


def make_their_layer(stored: StoredLayer, kind: str = "qlinear_torch") -> Any:
    """Make auto-round's layer of this shape."""
    linear = pytest.importorskip(f"auto_round_extension.torch.{kind}", reason=REASON)
    rows, k = stored.shape
    settings = {name: stored.settings[name] for name in ("bits", "group_size")}
    return linear.QuantLinear(**settings, infeatures=k, outfeatures=rows, bias=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_are_exact_or_refused(dtype: torch.dtype):
    """Their output for unit vectors is their weight."""
    outcomes: Counter[str] = Counter()
    own = fp16 if dtype == torch.float16 else BF16
    for fmt, bits in ((integer(4), 4), (integer(8), 8)):
        for granularity in (PerGroup(32), PerGroup(64), PerGroup(128), PerChannel()):
            for scale in (AbsMax(own), AbsMax(), MinMax(own)):
                signed = isinstance(scale, AbsMax)
                quantizer = Quantizer(fmt if signed else integer(bits, False), granularity, scale)
                layer = make_packed_layer(quantizer, dtype, source=nn.Linear(128, 32))
                stored = store(AutoRound(), layer, (32, 128))
                outcomes["refused" if stored is None else "exact"] += 1
                if stored is None:
                    continue
                theirs = make_their_layer(stored)
                for name, value in stored.tensors.items():
                    assert value.shape == getattr(theirs, name).shape, name
                    setattr(theirs, name, value)
                weight = layer.dequantize(dtype)
                assert theirs(torch.eye(128, dtype=dtype)).T.equal(weight)
                layout, buffers = pack_grid(AutoRound().decode(stored))
                back = layout.dequantize(buffers, 128, layout.build_lookup_table())
                assert back.to(dtype).equal(weight)
                assert stored.settings["sym"] == signed
    assert outcomes == {"exact": 16, "refused": 8}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", ["auto_round", "auto_round:auto_gptq"])
def test_layers_that_auto_round_packed_are_read(bits: int, packing: str):
    """In the packing of auto_gptq, zero points are stored less by one."""
    torch.manual_seed(0)
    config = {"bits": bits, "group_size": 32, "sym": False, "packing_format": packing}
    kind = "qlinear_torch_zp" if packing.endswith("gptq") else "qlinear_torch"
    theirs = make_their_layer(StoredLayer((32, 128), {}, config), kind)
    theirs.device = "cpu"
    scales = torch.rand(32, 4).half().float()
    zeros = torch.randint(1, 2**bits, (32, 4)).float()
    theirs.pack(nn.Linear(128, 32, bias=False), scales, zeros, device="cpu")
    tensors = {name: getattr(theirs, name) for name in ("qweight", "qzeros", "scales")}
    settings = AutoRound().read_settings("layer", config, tensors)
    assert settings is not None
    layout, buffers = AutoRound().restore(StoredLayer((32, 128), tensors, settings))
    ours = layout.dequantize(buffers, 128, layout.build_lookup_table())
    assert theirs(torch.eye(128)).T.half().equal(ours.half())


@pytest.mark.parametrize(
    ("quantizer", "shape", "dtype", "reason"),
    [
        (Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16)), (32, 128), "half", "format=int4"),
        (Quantizer(integer(4), PerGroup(16), AbsMax(fp16)), (32, 128), "half", "size=128"),
        (Quantizer(integer(4), PerGroup(32), AbsMax(fp16)), (24, 128), "half", "multiples of 32"),
        (Quantizer(integer(4), PerGroup(32), AbsMax(fp16)), (32, 128), "float", "computes in 16"),
        (Quantizer(integer(4), PerGroup(32), AbsMax()), (32, 128), "half", "scale.dtype=fp16"),
        (Quantizer(integer(4), PerGroup(32), AbsMax(fp16)), (32, 128), "bfloat16", "dtype=bf16"),
    ],
)
def test_refusals_name_an_override(quantizer: Quantizer, shape: Any, dtype: str, reason: str):
    layer = make_packed_layer(quantizer, getattr(torch, dtype), source=nn.Linear(*shape[::-1]))
    with pytest.raises(UserError, match=reason):
        AutoRound().store(layer, shape, layer.dtype)
