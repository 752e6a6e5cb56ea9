"""All stages of every preset on a tiny model of every family."""

import json
from itertools import product
from pathlib import Path

import pytest

from pipelines.config.resolvers import list_options
from tests.faults.conftest import LONG
from tests.helpers import tiny
from tests.helpers.model_families import FAMILIES
from tests.helpers.small_runs import FEW, SEARCH, run_stages

MODELS = {
    "sigma": ["model=pixart_sigma", "model.tokens=20"],
    "alpha": ["model=pixart_alpha", "model.tokens=20"],
}
MODELS |= {name: [FAMILIES[name].overrides[0]] for name in ("hunyuan", "hunyuan_v1_2", "dit")}
METHODS = [name for name in list_options("method") if name != "fp16"]
PAIRS = list(product(MODELS, METHODS))
FEW_PAIRS = [
    ("alpha", "vidit_q_ranges"),  # a layer reads two vectors per sample: height and width
    ("hunyuan", "gptq"),
    ("hunyuan_v1_2", "hq_dit"),
    ("dit", "tfmq_dm"),
]
FEW_STEPS = [
    f"iterations.{name}=2"
    for name in ("adaround", "adaround_scale_aware", "input_steps", "signround")
]
METHOD_OPTIONS = {
    "llmfp4_baseline": SEARCH,
    "llmfp4_fpq": SEARCH,
    "fp4dit_ft": ["finetune.steps=2"],
    "w4a4_ft": ["finetune.steps=2"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a tiny model of each family."""
    paths = {name: tmp_path_factory.mktemp(name) for name in MODELS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 128)
        for name, folder in paths.items():
            (FAMILIES[name].save if name in FAMILIES else tiny.save)(folder)
    return paths


@pytest.mark.parametrize(("family", "method"), PAIRS if LONG else FEW_PAIRS)
@pytest.mark.unchecked
def test_a_preset_runs_on_a_family(
    folders: dict[str, Path], tmp_path: Path, family: str, method: str
):
    overrides = [
        *MODELS[family],
        f"model.path={folders[family]}",
        "model.dtype=float32",
        "metrics=paired",
        *FEW_STEPS,
    ]
    options = METHOD_OPTIONS.get(method, [])
    paths = run_stages(
        tmp_path, *overrides, f"method={method}", *options, "calibration.steps=3", small=FEW
    )
    score = json.loads((paths["score"] / "metrics.json").read_text())["metrics"]["psnr"]["mean"]
    assert 15 < score < 60
