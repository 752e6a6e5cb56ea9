"""The console command: its pages need no torch, and its commands are those of `pipelines`."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fp4dit
from pipelines.cli.program import EXPERIMENT_COMMANDS, MODEL_COMMANDS
from tests.conftest import ROOT, TOY, Run

MODULES = [path.stem for path in (ROOT / "pipelines").glob("[!_]*.py")]

# Runs the program, and prints which of these modules it imported.
LIST_IMPORTS = """
import sys
from pipelines.cli.program import main
try:
    main()
finally:
    print([name for name in ("torch", "diffusers", "lightning") if name in sys.modules])
"""

SCREEN = (40, 100)  # lines, and characters of a line


def run_program(*arguments: str, code: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run `fp4dit` with these arguments, or other code, in another process."""
    source = ["-c", code] if code else ["-m", "pipelines.cli.program"]
    return subprocess.run(
        [sys.executable, *source, *arguments],
        cwd=ROOT,
        env={**os.environ, "HYDRA_FULL_ERROR": "0", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def fits_screen(page: str) -> bool:
    lines = page.splitlines()
    return len(lines) <= SCREEN[0] and max(map(len, lines)) <= SCREEN[1]


def test_every_module_of_pipelines_is_a_command():
    assert {*EXPERIMENT_COMMANDS, "inspect"} == set(MODULES)
    assert not EXPERIMENT_COMMANDS.keys() & MODEL_COMMANDS.keys()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "usage: fp4dit COMMAND"),
        (["--help"], "usage: fp4dit COMMAND"),
        (["--version"], fp4dit.__version__),
        (["methods"], "nvfp4_4over6"),
        (["methods", "ptq4dit"], "It differs from its authors' code:"),
        *(([name, "--help"], f"usage: fp4dit {name}") for name in MODEL_COMMANDS),
    ],
)
def test_pages_need_no_torch(arguments: list[str], text: str):
    done = run_program(*arguments, code=LIST_IMPORTS)
    page, modules = done.stdout.rstrip().rsplit("\n", 1)
    assert text in page
    assert modules == "[]"
    assert fits_screen(page) or arguments[0] == "methods"


@pytest.mark.parametrize("name", sorted({*MODULES} - {"run"}))
def test_help_of_each_experiment_command_fits_a_screen(run: Run, capfd, name: str):
    assert run("--help", main=import_module(f"pipelines.{name}").main, outputs=False) == 0
    assert fits_screen(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qantize"], "error: there is no command 'qantize'; did you mean quantize?"),
        (["table", "table=demmo"], "error: table=demmo: 'table' has no option 'demmo'; did you"),
        (["inspect", "pixart_alfa"], "error: pixart_alfa: this is no folder, no hub id"),
        (["inspect", "shapes", "weight.format=e1m3x"], "format 'e1m3x' is not known; did you mean"),
    ],
)
def test_a_mistake_gets_one_message(arguments: list[str], message: str):
    done = run_program(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr


def test_a_sweep_starts_its_jobs_in_other_processes(tmp_path: Path):
    """The jobs are pickled, as they are with `python -m pipelines.run`."""
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run_program("run", "-m", *TOY, "seed=0,1", *launcher, f"outputs={tmp_path}")
    assert done.returncode == 0, done.stderr
    scores = [path for path in (tmp_path / "store" / "score").iterdir() if path.is_dir()]
    assert len(scores) == 2


def test_words_are_completed_in_bash(tmp_path: Path):
    """The shell function that Hydra installs asks `fp4dit` for the words."""
    program = tmp_path / "fp4dit"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from pipelines.cli.program import main\nmain()\n"
    )
    program.chmod(0o755)
    script = """
eval "$(fp4dit run -sc install=bash)"
complete -p fp4dit
for line in "fp4dit tab" "fp4dit run weight=nvfp4_4" "fp4dit table table=dem"; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_WORDS=($line)
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    installed, *words = done.stdout.splitlines()
    assert installed.endswith("-F hydra_bash_completion fp4dit"), done.stderr
    assert words == ["table", "weight=nvfp4_4over6", "table=demo"]
