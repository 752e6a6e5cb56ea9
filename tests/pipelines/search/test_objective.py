"""Objectives of a run: the means that tables print, or an error that names them."""

import json
from pathlib import Path

import pytest

from fp4dit.utils.errors import UserError
from pipelines.results.columns import load_catalog
from pipelines.search.objective import (
    ObjectiveValue,
    check_objectives,
    find_directions,
    read_objective,
)
from tests.conftest import TOY, Compose, Run

METRICS = {
    "n": 6,
    "metrics": {"psnr": {"mean": 31.5, "low": 30.0, "high": 33.0}, "oracle": None},
    "groups": {"psnr": {"photo": {"mean": 29.0, "low": 28.0, "high": 30.0}}},
    "scalars": {"bits_weight": 4.125},
}


@pytest.fixture
def results(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    return {"score": tmp_path}


def test_a_name_gives_a_number_and_a_list_gives_a_list(composed: Compose, results: dict[str, Path]):
    def read(text: str) -> ObjectiveValue:
        return read_objective(composed(f"objective={text}"), results)

    assert read("null") is None
    assert read("psnr") == 31.5
    assert read("'psnr:photo'") == 29.0
    assert read("[bits_weight,psnr_low]") == [4.125, 30.0]
    with pytest.raises(
        UserError, match="objective=oracle: this has no number here; there are n, bits_weight, psnr"
    ):
        read("oracle")


def test_an_objective_without_a_score_is_refused(
    run: Run, composed: Compose, tmp_path: Path, capfd
):
    with pytest.raises(UserError, match="this is not scored without its weights: "):
        check_objectives(composed("objective=hps_v2", "metrics=paper"))
    with pytest.raises(UserError, match=r"targets=\['capture'\] has no scores; add score"):
        check_objectives(composed("objective=bits_weight", "targets=[capture]"))
    check_objectives(composed("objective=[psnr,'oracle:plain',calibration_seconds,n]"))
    assert run(*TOY, "objective=psmr") == 1
    assert "error: objective=psmr: this is not scored; did you mean psnr" in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_directions_are_those_of_tables():
    catalog = load_catalog()
    names = ["psnr", "lpips", "fid/coco-5000/tf-bilinear", "hps_v2_1:photo", "block_error"]
    directions = ["maximize", "minimize", "minimize", "maximize", "minimize"]
    assert find_directions(names, catalog) == directions
    with pytest.raises(
        UserError, match=r"bits_weight has no better direction: .*direction=\[\.\.\.,minimize\]"
    ):
        find_directions(["psnr", "bits_weight"], catalog)
