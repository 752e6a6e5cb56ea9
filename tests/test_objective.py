"""What a run returns: the means that tables print, or one message that says which there are."""

import json
from pathlib import Path

import pytest

from fp4dit.errors import UserError
from pipelines.objective import check, directions, value
from tests.conftest import TOY, Compose, Run

METRICS = {
    "n": 6,
    "metrics": {"psnr": {"mean": 31.5, "low": 30.0, "high": 33.0}, "oracle": None},
    "groups": {"psnr": {"photo": {"mean": 29.0, "low": 28.0, "high": 30.0}}},
    "scalars": {"bits_weight": 4.125},
}


@pytest.fixture
def scored(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    return {"score": tmp_path}


def test_a_name_gives_a_number_and_a_list_a_list(composed: Compose, scored: dict[str, Path]):
    given = lambda text: value(composed(f"objective={text}"), scored)
    assert given("null") is None
    assert given("psnr") == 31.5
    assert given("'psnr:photo'") == 29.0
    assert given("[bits_weight,psnr_low]") == [4.125, 30.0]
    with pytest.raises(UserError, match="objective=oracle: this has no number here; there are n, bits_weight, psnr"):
        given("oracle")


def test_what_cannot_be_scored_is_refused_before_a_run(run: Run, composed: Compose, tmp_path: Path, capfd):
    with pytest.raises(UserError, match="this is not scored for lack of weights: "):
        check(composed("objective=hps_v2", "metrics=paper"))
    with pytest.raises(UserError, match=r"targets=\['capture'\] has no scores; add score"):
        check(composed("objective=bits_weight", "targets=[capture]"))
    check(composed("objective=[psnr,'oracle:plain',calibration_seconds,n]"))
    assert run(*TOY, "objective=psmr") == 1
    assert "error: objective=psmr: this is not scored; did you mean psnr" in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


def test_directions_are_those_of_tables():
    assert directions(["psnr", "lpips", "fid/coco-5000/tf-bilinear", "hps_v2_1:photo"]) == [
        "maximize",
        "minimize",
        "minimize",
        "maximize",
    ]
    with pytest.raises(UserError, match=r"which bits_weight is better\? .*direction=\[\.\.\.,minimize\]"):
        directions(["psnr", "bits_weight"])
