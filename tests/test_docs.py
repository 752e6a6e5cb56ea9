"""The code and the commands that the documentation shows work."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep

from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import list_options
from tests.conftest import ROOT
from tests.helpers import tiny

PAGE = (ROOT / "docs" / "your_model.md").read_text()
ADAPTER, CHECK = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the adapter as a module; return the check of it on a model of published size."""
    (tmp_path / "my_models.py").write_text(ADAPTER)
    monkeypatch.syspath_prepend(tmp_path)
    with init_empty_weights():
        SD3Transformer2DModel(caption_projection_dim=1152).save_config(tmp_path / "transformer")
    return CHECK.replace("/my/sd3", str(tmp_path))


def test_the_adapter_passes_the_check(check: str):
    exec(check, {})


def test_the_check_finds_a_mistake(check: str):
    wrong = {}
    exec(ADAPTER.replace('arguments["timestep"]', 'arguments["timestep"] + 1'), wrong)
    with pytest.raises(UserError, match="time_text_embed of SD3Transformer2DModel, called alone"):
        exec(
            check.replace("from my_models import SD3Adapter", ""),
            {"SD3Adapter": wrong["SD3Adapter"]},
        )


def test_the_adapter_draws(check: str, tmp_path: Path):
    import my_models  # pyright: ignore[reportMissingImports]

    tiny.save_sd3(tmp_path / "pipeline")
    pipeline = my_models.SD3(str(tmp_path / "pipeline")).load()
    assert pipeline.sample(tiny.PROMPTS[:2], [1, 2], 1, 4.5).shape[:2] == (2, 3)


SHOWN = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("conf/**/*.yaml"),
    *ROOT.glob("benchmarks/*.md"),
]
RECIPES = ["make", "--always-make", "--dry-run", "demo", "table", "TABLE=demo"]


def find_overrides(text: str) -> list[list[str]]:
    """Return the overrides of each command of ours in a text.

    A command ends at the end of its line, or of the code that it is a part of.
    """
    commands = []
    for arguments in re.findall(r"python -m pipelines\.\w+((?:\\\n|[^`\n#;&|])*)", text):
        words = shlex.split(arguments)
        commands.append([word for word in words if re.match(r"[+~]*[\w./@]+=", word)])
    return commands


@pytest.fixture(scope="module")
def shown_overrides() -> list[list[str]]:
    """The overrides of all commands that the documentation, the configs and the Makefile show."""
    make = subprocess.run(RECIPES, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = find_overrides(make.stdout)
    for path in SHOWN:
        commands += find_overrides(path.read_text())
    return commands


def test_shown_commands_can_be_parsed(shown_overrides: list[list[str]]):
    """Hydra wants quotes around an override that is a part of another one's value."""
    assert len(shown_overrides) > 100
    for overrides in shown_overrides:
        OverridesParser.create().parse_overrides(overrides)


def test_shown_commands_name_options_that_exist(shown_overrides: list[list[str]]):
    unknown = set()
    for overrides in shown_overrides:
        for override in OverridesParser.create().parse_overrides(overrides):
            is_hydras = override.key_or_group.startswith("hydra/")
            options = [] if is_hydras else list_options(override.key_or_group)
            value = override.value()
            if isinstance(value, ChoiceSweep):
                value = value.list
            for name in value if isinstance(value, list) else [value]:
                if options and str(name) not in options and "glob" not in override.input_line:
                    unknown.add(f"{override.key_or_group}={name}")
    assert unknown == {"table=NAME"}  # stands for any table
