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
    page = render_page(
        {
            "flux": ("FluxPipeline", {"W4A8": PASSES, "NVFP4": refused}),
            "wan": ("WanPipeline", {"W4A8": refused, "NVFP4": PASSES}),
        }
    )
    assert "| `flux` | FluxPipeline | passes | [1] |" in page
    assert "| `wan` | WanPipeline | [1] | passes |" in page
    assert page.count("1. refused: no layer / of 'x' is left\n") == 1
    assert "**2 of 4** combinations pass" in page.replace("\n", " ")


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
