"""What the documentation shows runs, and does what it says."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from hydra.core.override_parser.overrides_parser import OverridesParser

from fp4dit.errors import UserError
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your_model.md").read_text()
ADAPTER, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The check, of a transformer of published size, and beside it the adapter that it imports."""
    (tmp_path / "my_models.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    with init_empty_weights():
        SD3Transformer2DModel(caption_projection_dim=1152).save_config(tmp_path / "transformer")
    return CHECK.replace("/my/sd3", str(tmp_path))


def test_the_adapter_passes_the_check(check: str):
    exec(check, {})


def test_the_check_would_have_found_a_mistake(check: str):
    wrong = {}
    exec(ADAPTER.replace('(s["timestep"], s["pooled"])', '(s["timestep"] + 1, s["pooled"])'), wrong)
    with pytest.raises(UserError, match="time_text_embed of SD3Transformer2DModel, called alone"):
        exec(check.replace("from my_models import SD3Adapter", ""), {"SD3Adapter": wrong["SD3Adapter"]})


def test_the_adapter_draws(check: str, tmp_path: Path):
    import my_models  # pyright: ignore[reportMissingImports]

    tiny.save_sd3(tmp_path / "pipeline")
    pipeline = my_models.SD3(str(tmp_path / "pipeline")).load()
    assert pipeline.sample(tiny.PROMPTS[:2], [1, 2], 1, 4.5).shape[:2] == (2, 3)


def commands(text: str) -> list[str]:
    """The arguments of each command of ours that is shown, to the end of its line or of the code that it is part of."""
    return re.findall(r"python -m pipelines\.\w+((?:\\\n|[^`\n#;&|])*)", text)


SHOWN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("conf/**/*.yaml"), *ROOT.glob("benchmarks/*.md")]
RECIPES = ["make", "--always-make", "--dry-run", "demo", "table", "TABLE=demo"]


def test_commands_that_are_shown_can_be_read():
    """By Hydra, which wants quotes around an override that is part of another one's value."""
    recipes = subprocess.run(RECIPES, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = [shown for text in (recipes, *(path.read_text() for path in SHOWN)) for shown in commands(text)]
    assert len(found) > 100
    for shown in found:
        given = [word for word in shlex.split(shown) if re.match(r"[+~]*[\w./@]+=", word)]
        OverridesParser.create().parse_overrides(given)
