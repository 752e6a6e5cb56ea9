"""Who may import what, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "fp4dit").rglob("*.py"))
ORCHESTRATION = sorted([*(ROOT / "pipelines").rglob("*.py"), *(ROOT / "hydra_plugins").rglob("*.py")])
named = lambda path: str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Full names: `import a.b` and `from a import b` both give a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_the_library_knows_nothing_of_orchestration(path: Path):
    assert not roots(path) & {"hydra", "omegaconf", "wandb", "pipelines"}


@pytest.mark.parametrize("path", ORCHESTRATION, ids=named)
def test_orchestration_computes_on_no_tensor(path: Path):
    """torch only to hand data to a Trainer and to say which bits may differ; tensor libraries not at all."""
    allowed = {
        "parted.py": {"torch.utils.data.DataLoader", "torch.utils.data.IterableDataset"},
        "runtime.py": {"torch.utils.deterministic"},
    }
    assert {name for name in imports(path) if name.split(".")[0] == "torch"} <= allowed.get(path.name, set())
    assert not roots(path) & {"numpy", "diffusers", "transformers", "safetensors", "open_clip"}


@pytest.mark.parametrize("path", [*LIBRARY, *ORCHESTRATION], ids=named)
def test_nothing_is_loaded_that_could_run_code(path: Path):
    assert not roots(path) & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called not in ("torch.save", "eval", "exec", "np.load", "numpy.load"), called
            assert "trust_remote_code" not in options
            if called == "torch.load":  # published checkpoints of metrics
                assert path.name == "checkpoint.py"
                assert options["weights_only"] == "True"


def test_the_library_has_all_the_parts_this_test_is_about():
    assert {"formats.py", "rounding.py", "stream.py"} <= {path.name for path in LIBRARY}
    assert {"stages.py", "run.py", "plan.py"} <= {path.name for path in ORCHESTRATION}


def test_no_network_and_no_gpu_at_import():
    """Everything imports where sockets are forbidden, and leaves CUDA alone."""
    modules = [named(path)[:-3].replace("/", ".").removesuffix(".__init__") for path in [*LIBRARY, *ORCHESTRATION]]
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
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"imported {len(modules)}", done.stderr[-2000:]
