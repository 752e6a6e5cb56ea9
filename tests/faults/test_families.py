"""Every preset on every family of models, through all stages: as wide as groups of 128 need, and seconds each."""

import json
from pathlib import Path

import pytest

from pipelines.resolvers import options
from tests import tiny
from tests.faults.conftest import LONG
from tests.test_end_to_end import FEW, SEARCH, run
from tests.test_models import FAMILIES

OWN = {"sigma": ["model=pixart_sigma", "model.tokens=20"], "alpha": ["model=pixart_alpha", "model.tokens=20"]}
OWN |= {name: [FAMILIES[name].overrides[0]] for name in ("hunyuan", "hunyuan_v1_2", "dit")}
METHODS = [name for name in options("method") if name != "fp16"]
UNFIT = {("hunyuan", "tfmq_dm"), ("hunyuan_v1_2", "tfmq_dm")}  # of which only blocks are quantized: no time embedding
PAIRS = [(family, method) for family in OWN for method in METHODS if (family, method) not in UNFIT]
FEW_PAIRS = [
    ("alpha", "smoothquant"),
    ("alpha", "vidit_q_ranges"),  # a layer that reads two vectors for a sample: of height and width
    ("hunyuan", "gptq"),
    ("hunyuan_v1_2", "hq_dit"),
    ("dit", "q_dit"),
    ("dit", "tfmq_dm"),
    ("sigma", "mr_gptq"),
]
FEWER = ["budget.adaround=2", "budget.scale_aware=2", "budget.signround=2"]
MORE = {"llmfp4_baseline": SEARCH, "llmfp4_fpq": SEARCH, "fp4dit_ft": ["tuning.steps=2"], "w4a4_ft": ["tuning.steps=2"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: tmp_path_factory.mktemp(name) for name in OWN}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "WIDTH", 128)
        for name, folder in made.items():
            (FAMILIES[name].save if name in FAMILIES else tiny.save)(folder)
    return made


@pytest.mark.parametrize(("family", "method"), PAIRS if LONG else FEW_PAIRS)
@pytest.mark.unchecked
def test_a_preset_runs_on_a_family(folders: dict[str, Path], tmp_path: Path, family: str, method: str):
    given = [*OWN[family], f"model.path={folders[family]}", "model.dtype=float32", "metrics=paired", *FEWER]
    more = MORE.get(method, [])
    paths = run(tmp_path, *given, f"method={method}", *more, "calibration.steps=3", small=FEW)
    score = json.loads((paths["score"] / "metrics.json").read_text())["metrics"]["psnr"]["mean"]
    assert 15 < score < 60
