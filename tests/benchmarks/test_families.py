"""The page of families says what passes, and why something does not."""

from pathlib import Path

import pytest

from benchmarks import families
from benchmarks.families import PASSES, PRESETS, render_page, run_cell
from fp4dit.utils.errors import UserError
from tests.conftest import ROOT
from tests.helpers.strangers import STRANGERS
from tests.helpers.tiny_families import TINY_FAMILIES


def test_reasons_are_notes_that_are_written_once():
    refused = "refused: no layer | of 'x'\nis left"
    results = {
        "flux": {"pipeline": "FluxPipeline", "results": {"W4A8": PASSES, "NVFP4": refused}},
        "wan": {"pipeline": "WanPipeline", "results": {"W4A8": refused, "NVFP4": PASSES}},
        "ltx": {"pipeline": "LTXPipeline", "results": {"NVFP4": PASSES}},
    }
    page = render_page(results, ["flux", "wan", "ltx"], ["W4A8", "NVFP4"])
    assert "| `flux` | FluxPipeline | passes | [1] |" in page
    assert "| `wan` | WanPipeline | [1] | passes |" in page
    assert page.count("1. refused: no layer / of 'x' is left\n") == 1
    assert "| `ltx` | LTXPipeline | not run | passes |" in page
    about = page.replace("\n", " ")
    assert "**3 of 5** combinations that were run pass." in about
    assert "1 combinations were not run yet." in about


def test_finished_combinations_are_not_run_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "run_cell", lambda *_: PASSES)
    assert not list(families.run_family("flux", ["NVFP4"], {"NVFP4": PASSES}))
    done = list(families.run_family("flux", ["W4A8", "NVFP4"], {"NVFP4": PASSES}))
    assert done == [("FluxPipeline", "W4A8", PASSES)]


@pytest.mark.parametrize("error", [UserError("no layer fits"), ValueError("no layer fits")])
def test_an_error_is_the_reason(error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(families, "run_stages", fail)
    reason = run_cell(TINY_FAMILIES["wan"], tmp_path, tmp_path, "NVFP4")
    kind = "refused" if isinstance(error, UserError) else "ValueError"
    assert reason == f"{kind}: no layer fits"


def test_the_page_has_all_families_and_presets():
    page = (ROOT / "docs" / "results" / "families.md").read_text()
    for name in (*TINY_FAMILIES, *STRANGERS):
        assert f"| `{name}` |" in page
    for preset, overrides in PRESETS.items():
        assert f"- **{preset}** is `{' '.join(overrides)}`" in page
