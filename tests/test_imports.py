"""Modules import nothing that runs foreign code, and pipelines do not compute on tensors.

`lint-imports` in `make check` checks which package may import which (pyproject.toml).
"""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.helpers.requirements import normalize_name

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "fp4dit").rglob("*.py"))
ORCHESTRATION = sorted(
    [*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")]
)


def get_relative_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read_imports(path: Path) -> set[str]:
    """Return the full names of all imports: `import a.b` and `from a import b` both give a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def read_roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in read_imports(path)}


@pytest.mark.parametrize("path", ORCHESTRATION, ids=get_relative_name)
def test_orchestration_does_not_compute_on_tensors(path: Path):
    """Pipelines use torch in types, for a Trainer's data, and to find a GPU or set its mode."""
    allowed = {
        "stages/sharded.py": {"torch.utils.data.DataLoader", "torch.utils.data.IterableDataset"},
        "runtime/trainer.py": {"torch.utils.deterministic"},
        "stages/finetune.py": {"torch.Tensor"},
        "stages/replay.py": {"torch.utils.data.Subset"},
        "cli/model_commands.py": {"torch.cuda"},
    }
    torch_imports = {name for name in read_imports(path) if name.split(".")[0] == "torch"}
    place = str(path.relative_to(ROOT / path.relative_to(ROOT).parts[0]))
    assert torch_imports <= allowed.get(place, set())
    assert not read_roots(path) & {"numpy", "diffusers", "transformers", "safetensors", "open_clip"}


@pytest.mark.parametrize("path", [*LIBRARY, *ORCHESTRATION], ids=get_relative_name)
def test_no_loader_can_run_code(path: Path):
    assert not read_roots(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("torch.save", "eval", "exec", "np.load", "numpy.load"), called
            assert "trust_remote_code" not in options
            if called == "torch.load":  # published checkpoints of metrics
                assert path == ROOT / "fp4dit/metrics/loading.py"
                assert options["weights_only"] == "True"


def test_this_test_finds_the_modules():
    assert {"formats.py", "rounding.py", "propagate.py"} <= {path.name for path in LIBRARY}
    assert {"sharded.py", "run.py", "plan.py"} <= {path.name for path in ORCHESTRATION}


def test_every_package_that_is_imported_is_a_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = list(project["dependencies"])
    for extra in project["optional-dependencies"].keys() - {"dev", "docs"}:
        required += project["optional-dependencies"][extra]
    names = {*map(normalize_name, required), "triton"}  # torch requires it where there are GPUs
    distributions = packages_distributions()
    imported = set().union(*map(read_roots, [*LIBRARY, *ORCHESTRATION]))
    for module in imported - sys.stdlib_module_names - {"fp4dit", "pipelines", "hydra_plugins"}:
        assert names & set(map(normalize_name, distributions[module])), module


def test_importing_the_library_imports_no_large_package():
    large = ("torch", "numpy", "diffusers", "transformers", "hydra", "omegaconf", "lightning")
    program = f"import fp4dit, sys; print([name for name in {large} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "[]", done.stderr[-2000:]


def test_no_network_and_no_gpu_at_import():
    """All modules can be imported without a network, and do not initialize CUDA."""
    modules = [
        get_relative_name(path)[:-3].replace("/", ".").removesuffix(".__init__")
        for path in [*LIBRARY, *ORCHESTRATION]
    ]
    program = f"""
import importlib, socket
def refuse(*_, **__):
    raise AssertionError("network at import")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
for name in {modules!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
print("imported", len({modules!r}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == f"imported {len(modules)}", done.stderr[-2000:]
