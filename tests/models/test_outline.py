"""Outlines of models: they are those of the models, and make the same tables."""

from pathlib import Path

import pytest
import torch
from torch import nn

import pipelines.inspect
from benchmarks.outlines import OPTIONS, make_outline
from fp4dit.models.outline import (
    OUTLINES,
    ModelOutline,
    compress_shapes,
    expand_shapes,
    find_outline,
)
from tests.conftest import Run

pytestmark = pytest.mark.unchecked


@pytest.mark.parametrize("option", OPTIONS)
def test_an_outline_is_that_of_the_model(option: str):
    """After a change of the model, `python -m benchmarks.outlines` writes them again."""
    expected, stored = make_outline(option), ModelOutline.read(OUTLINES / f"{option}.json")
    assert stored == expected
    module = stored.build_module()
    layers = (nn.Linear, nn.Conv2d)
    names = [name for name, layer in module.named_modules() if isinstance(layer, layers)]
    assert sorted(names) == sorted(expected.layers)
    assert all(parameter.is_meta for parameter in module.parameters())


@pytest.mark.parametrize(
    ("model", "method"),
    [
        ("pixart_alpha", "fp4dit"),
        ("hunyuan", "svdquant_nvfp4_gptq"),
        ("dit_xl_2", "mxfp4_rtn"),
        ("shapes", "vidit_q_ranges"),
        ("shapes", "best_w4a4"),
        ("shapes", "fp16"),
    ],
)
def test_a_table_is_that_of_the_model(
    run: Run, capfd, monkeypatch: pytest.MonkeyPatch, model: str, method: str
):
    arguments = [f"model={model}", f"method={method}", "layers=all", "costs=false"]
    assert run(*arguments, main=pipelines.inspect.main) == 0
    quick = capfd.readouterr().out
    assert len(quick.splitlines()) > 50
    monkeypatch.setattr(pipelines.inspect, "find_outline", lambda _: None)
    assert run(*arguments, main=pipelines.inspect.main) == 0
    assert capfd.readouterr().out == quick


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": 21},
        {"path": "pkg://fp4dit/worlds/emoji/weights"},
        {"path": "owner/name"},
        {"_target_": "fp4dit.models.DiT"},
    ],
)
def test_another_model_has_no_outline(changed: dict):
    model = {"_target_": "fp4dit.models.PixArt", "path": "pkg://fp4dit/worlds/shapes/weights"}
    model |= {"tokens": 20, "dtype": "float32"}
    assert find_outline(model)
    assert find_outline(model | changed) is None


def test_equal_shapes_of_successive_blocks_are_one_line(tmp_path: Path):
    shapes = {"in": torch.Size([4, 2]), "a.1.b.0.c": torch.Size([3])}
    shapes |= {f"a.{i}.b.0.d": torch.Size([i // 3, 5]) for i in (0, 1, 2, 3, 5)}
    assert compress_shapes(shapes) == {
        "in": "4x2",
        "a.1-1.b.0.c": "3",
        "a.0-2.b.0.d": "0x5",
        "a.3-3.b.0.d": "1x5",
        "a.5-5.b.0.d": "1x5",
    }
    assert expand_shapes(compress_shapes(shapes)) == shapes
