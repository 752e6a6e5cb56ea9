"""What `fp4dit.targets` says of a method is what an export of the shipped model does."""

import copy
from typing import Any

import pytest
import torch

import fp4dit
from fp4dit.api.targets import list_targets
from fp4dit.packed.targets.export import store_model
from fp4dit.packed.targets.folders import COMPUTE_DTYPES
from fp4dit.utils.errors import UserError
from tests.packed.targets.test_reload import load_shipped

METHODS = ["rtn_fp4", "rtn_int4", "nvfp4_4over6", "mxfp4_rtn"]


def export(model: Any, target: Any, dtype: str, dense: Any) -> None:
    """Store the model in `dtype`, whatever its class. Raise UserError if a layer is refused."""
    torch_dtype = COMPUTE_DTYPES[dtype]
    model = copy.deepcopy(model)
    torch.nn.Module.to(model, torch_dtype)
    skeleton = load_shipped().transformer
    store_model(model, target, {}, skeleton, torch_dtype, dense)


@pytest.mark.unchecked
@pytest.mark.parametrize("method", METHODS)
def test_exports_do_what_is_said(method: str, monkeypatch: pytest.MonkeyPatch):
    pipe = load_shipped()
    fp4dit.quantize(pipe, method, overrides=["activation=none"])
    targets = {target.name: target for target in list_targets()}
    fits = fp4dit.targets([method])
    assert [fit.target for fit in fits] == sorted(targets)
    for fit in fits:
        target = targets[fit.target]
        monkeypatch.setattr(type(target), "check_model", lambda self, name: None)
        if (method, fit.target) == ("nvfp4_4over6", "compressed_tensors"):
            continue  # one layer in a hundred is refused, whichever its weights are
        if fit.dtype is not None:
            assert not fit.dense or fit.dense == ("pos_embed.proj",)
            export(pipe.transformer, target, fit.dtype, fit.dense)
            continue
        for dtype in COMPUTE_DTYPES:
            with pytest.raises(UserError):
                export(pipe.transformer, target, dtype, ["pos_embed.proj"])


def test_what_is_said():
    table = fp4dit.targets(["fp4dit"])
    heading, _, row = (line.split(" | ") for line in table.to_markdown().splitlines())
    assert row[0] == "| `fp4dit`"
    assert row[heading.index("sdnq")] == "float32"
    assert row[-1] == "128 values share a scale, and not 16 |"
    said = {fit.target: str(fit) for fit in table}
    assert said["sdnq"] == "exact in float32"
    assert said["gguf"] == "its values are e2m1, and not int4: use weight.format=int4"
    assert "128 values share a scale" in said["bfl"]
    for fit in fp4dit.targets(["svdquant_int4"]):
        holds = "smooth_low_rank_bf16" if fit.target == "nunchaku_lite" else "none"
        assert f"transform={holds}" in str(fit)
    overrides = ["transform=smooth_low_rank_bf16", "weight=int4_g64", "activation=int4_g64"]
    overrides += ["weight.scale.dtype=bf16", "+weight.ignore=[proj_out]"]
    fits = fp4dit.targets(["svdquant_int4"], overrides)
    said = {fit.target: str(fit) for fit in fits}
    dense = "export_format.dense=[pos_embed.proj]"
    assert said["nunchaku_lite"] == f"exact in bfloat16 with {dense}"
    fits = fp4dit.targets(["fp4dit"], ["weight.format=int4", "weight.layers.pre_gelu.format=int4"])
    said = {fit.target: str(fit) for fit in fits}
    assert said["gguf"] == "exact in float16 with export_format.dense=[pos_embed.proj]"
    with pytest.raises(UserError, match="no_method"):
        fp4dit.targets(["no_method"])
