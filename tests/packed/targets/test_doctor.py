"""`fp4dit doctor` finds the mistakes of converters that others have reported."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp4dit.api.targets import list_readers
from fp4dit.packed.targets.doctor import describe_findings, examine_folder
from fp4dit.utils.errors import UserError
from pipelines.cli.model_commands import doctor
from tests.helpers import tiny
from tests.packed.targets.cases import CASES

FILE = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An intact SDNQ checkpoint without checksums in `theirs`, and the original in `original`."""
    root = tmp_path_factory.mktemp("doctor")
    original = tiny.transformer()
    original.save_pretrained(root / "original")
    replace(CASES["sdnq"], build=lambda: original).save(root)
    save_file(load_file(root / "theirs" / FILE), root / "theirs" / FILE)
    return root


def swap_halves(state: dict[str, Tensor]) -> None:
    codes = state[f"{LAYER}.weight"]
    state[f"{LAYER}.weight"] = codes >> 4 | codes << 4


def interleave(state: dict[str, Tensor]) -> None:
    """Store each block of 32 as GGUF does, with codes i and i + 16 in a byte."""
    codes = state[f"{LAYER}.weight"]
    values = torch.stack([codes & 15, codes >> 4], 1).view(-1, 32)
    state[f"{LAYER}.weight"] = (values[:, :16] | values[:, 16:] << 4).flatten()


def permute_scales(state: dict[str, Tensor]) -> None:
    scale = state[f"{LAYER}.scale"]
    order = torch.randperm(len(scale), generator=torch.Generator().manual_seed(0))
    state[f"{LAYER}.scale"] = scale[order] * torch.logspace(-1, 1, len(scale)).view(-1, 1, 1)


def set_scales_to_one(state: dict[str, Tensor]) -> None:
    state[f"{LAYER}.scale"] = torch.ones_like(state[f"{LAYER}.scale"])


def insert_nan(state: dict[str, Tensor]) -> None:
    state[f"{LAYER}.scale"][3] = torch.nan


def insert_nan_in_bias(state: dict[str, Tensor]) -> None:
    state["proj_out.bias"][3] = torch.nan


def drop_a_bias(state: dict[str, Tensor]) -> None:
    del state["proj_out.bias"]


DISEASES: list[tuple[Callable[[dict[str, Tensor]], None], str, bool]] = [
    (swap_halves, "halves of each byte seem to be swapped", True),
    (interleave, "in another order within blocks of 32", True),
    (permute_scales, "scales seem to belong to other blocks", True),
    (set_scales_to_one, "scales are 1, as if they were not loaded", False),
    (insert_nan, "scales contain NaN", False),
    (insert_nan_in_bias, "proj_out.bias: it contains NaN", False),
    (drop_a_bias, "proj_out.bias: the checkpoint lacks it", False),
]


@pytest.mark.parametrize(("infect", "text", "needs_original"), DISEASES)
def test_diseases_are_found(
    folder: Path, tmp_path: Path, infect: Callable, text: str, needs_original: bool
):
    shutil.copytree(folder / "theirs", tmp_path / "sick")
    state = load_file(folder / "theirs" / FILE)
    infect(state)
    save_file(state, tmp_path / "sick" / FILE)
    original = str(folder / "original") if needs_original else None
    findings = examine_folder(str(tmp_path / "sick"), list_readers(), original)
    errors = [line for line in describe_findings(findings) if line.startswith("error")]
    assert len(errors) == 1
    assert text in errors[0]


def test_a_healthy_checkpoint_has_no_errors(folder: Path, capsys: pytest.CaptureFixture):
    doctor([str(folder / "theirs"), "--original", str(folder / "original")])
    assert capsys.readouterr().out.startswith("no errors were found")


def test_mistakes_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(UserError, match="give the original one"):
        doctor([str(folder / "theirs"), "--original", str(folder / "theirs")])
    with pytest.raises(UserError, match="quantized by fp4dit, and has to be by one of"):
        doctor([str(folder / "ours")])
    shutil.copytree(folder / "theirs", tmp_path / "dense")
    config = json.loads((tmp_path / "dense/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "sdnq"
    state = load_file(tmp_path / "dense" / FILE)
    for name in [name for name in state if name.startswith(LAYER) and not name.endswith("bias")]:
        del state[name]
    state[f"{LAYER}.weight"] = torch.randn(32, 32)
    save_file(state, tmp_path / "dense" / FILE)
    doctor([str(tmp_path / "dense")])
    said = capsys.readouterr().out
    assert f"note: {LAYER}: it is in a block of the model, and not quantized" in said
