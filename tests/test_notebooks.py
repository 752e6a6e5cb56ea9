"""The notebooks of docs/notebooks run, with few prompts and steps, and their results are right."""

import csv
import importlib.util
import os
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from torch import Tensor, nn

from fp4dit.calibration.dataset import UnitDataset
from fp4dit.models.blocks import make_simple_unit
from fp4dit.numerics.formats import floating, fp16
from fp4dit.numerics.quantizer import PerGroup, Quantizer
from fp4dit.numerics.scale_rules import AbsMax
from fp4dit.quantization.layers import QuantLayer
from tests.conftest import ROOT

pytestmark = pytest.mark.unchecked

FOLDER = ROOT / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))

# What stands in place of the sizes in the cell that is tagged `parameters`.
TINY = {
    "quantize_and_compare": "PROMPTS, CALIBRATION_PROMPTS, STEPS = 1, 2, 1",
    "write_a_method": "PROMPTS, CALIBRATION_PROMPTS, STEPS = 2, 2, 1",
    "read_a_table": 'PROMPTS, STEPS, METHODS = 2, 1, ["rtn", "mxfp6_rtn"]',
}

# Run after the last cell of a notebook.
CHECKS = {
    "quantize_and_compare": """
assert draw(loaded) == draw(quantized_while_loading) == quantized != original
assert abs(report.bits_weight - (4 + 8 / 16)) < 0.05  # E2M1, and an E4M3 scale for each 16
assert [method.method for method in comparison.methods[1:]] == ["rtn", "nvfp4_4over6", "gptq"]
assert comparison.methods[3].report.block_errors
assert {method.report.bits_activation for method in comparison.methods[1:]} == {16.0}
""",
    "write_a_method": """
nearest, descent = comparison.methods[1:]
assert abs(nearest.report.bits_weight - (4 + 16 / 32)) < 0.05  # E2M1, and an fp16 scale for each 32
assert nearest.report.bits_weight == descent.report.bits_weight
assert nearest.images != descent.images
""",
    "read_a_table": """
assert scored["psnr"][1] > scored["psnr"][0]  # 6 bits against 4
points = figure.data[0]
assert abs(points.y + points.error_y.array - scored["psnr_high"]).max() < 1e-6
assert abs(points.y - points.error_y.arrayminus - scored["psnr_low"]).max() < 1e-6
""",
}


class ThisInterpreter(KernelSpecManager):
    """Finds one kernel: ipykernel in the interpreter of the tests."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=kernel_name, language="python")


@pytest.fixture(scope="module")
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that executes a notebook once, and returns it with the folder that it ran in."""
    results: dict[str, tuple[NotebookNode, Path]] = {}

    def execute(name: str) -> tuple[NotebookNode, Path]:
        if name not in results:
            folder = tmp_path_factory.mktemp(name)
            results[name] = execute_tiny(name, folder), folder
        return results[name]

    return execute


def read_notebook(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute_tiny(name: str, folder: Path) -> NotebookNode:
    """Execute a notebook at a tiny size, and then its checks."""
    notebook = read_notebook(name)
    tags = [cell.metadata.get("tags") for cell in notebook.cells]
    notebook.cells.insert(tags.index(["parameters"]) + 1, nbformat.v4.new_code_cell(TINY[name]))
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS[name]))
    manager = AsyncKernelManager(
        kernel_spec_manager=ThisInterpreter(),
        connection_file=str(folder / "kernel.json"),
    )
    NotebookClient(
        notebook,
        km=manager,
        resources={"metadata": {"path": str(folder)}},
        startup_timeout=600,  # on a machine with other work
    ).execute(env=os.environ | {"IPYTHONDIR": str(folder / "ipython")})
    return notebook


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_without_a_failure(name: str, executed: Any):
    notebook, _ = executed(name)
    for cell in notebook.cells:
        printed = "".join(
            output.text for output in cell.get("outputs", []) if output.output_type == "stream"
        )
        assert printed.count("\n") < 60, cell.source


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_without_outputs(name: str):
    notebook = read_notebook(name)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    title, text = notebook.cells[0].source.split("\n\n")
    assert notebook.cells[0].cell_type == "markdown"
    assert re.fullmatch(r"# .+", title)
    assert len(re.findall(r"\.(\s|$)", text)) == 2  # sentences


def test_coordinate_descent_lowers_the_error_of_the_output(executed: Any):
    """The class of write_a_method on one layer, against rounding to nearest."""
    _, folder = executed("write_a_method")
    rounding = load_module(folder / "my_rounding.py").CoordinateDescent(batch_size=7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, 8, generator=generator) @ torch.randn(8, 64, generator=generator)
    original = nn.Linear(64, 32).requires_grad_(False)
    target = original(x)

    def round_layer(inputs: Tensor) -> QuantLayer:
        source = nn.Linear(64, 32)
        source.load_state_dict(original.state_dict())
        layer = QuantLayer(source, Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16))).prepare()
        unit = make_simple_unit("", ("x",), ("y",))
        dataset = UnitDataset(unit, {"x": inputs}, {"y": target}, torch.arange(len(inputs)))
        rounding.round_unit(layer, [layer], dataset, trainers=None)
        return layer

    def measure_error(layer: QuantLayer) -> float:
        return (layer(x) - target).square().sum().item()

    nearest = QuantLayer(original, Quantizer(floating(2, 1), PerGroup(32), AbsMax(fp16))).prepare()
    grid = nearest.weight_fake_quant
    descent = round_layer(x)
    assert torch.equal(grid(descent.weight_matrix), descent.weight_matrix)
    nearest.commit_weight()
    assert measure_error(descent) < 0.7 * measure_error(nearest)
    # Inputs that are uncorrelated leave nothing to cancel.
    assert torch.equal(round_layer(torch.eye(64)[:, None]).weight_matrix, nearest.weight_matrix)


def load_module(path: Path) -> ModuleType:
    """Import a Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_texts_of_a_table_are_those_of_its_csv(executed: Any):
    """The intervals in the DataFrame of read_a_table, against the standard library's CSV reader."""
    notebook, folder = executed("read_a_table")
    shown = "".join(
        output.get("data", {}).get("text/plain", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    rows = list(csv.DictReader((folder / "results/tables/formats.csv").open()))
    assert [row["label"] for row in rows] == ["full precision", "rtn", "mxfp6_rtn"]
    for row in rows[1:]:
        mean, low, high = (float(row[key]) for key in ("psnr", "psnr_low", "psnr_high"))
        assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in shown
