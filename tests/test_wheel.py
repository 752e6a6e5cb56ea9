"""The wheel holds every file, and its commands run in environments that have no checkout.

Two environments are made without a network. Both have the wheel installed. One sees all packages
of the environment that runs the tests; the other one links to those that the wheel's metadata
requires without an extra, and to no more.
"""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from fp4dit.utils.extras import EXTRAS
from tests.helpers.requirements import normalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("fp4dit", "pipelines", "hydra_plugins")
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
# What the build reads beside the packages.
BUILD_FILES = ("conf", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")

# Modules that a package of an extra is needed to import: metrics, image files, the training of the
# small models, and searches.
MODULES_OF_EXTRAS = (
    "fp4dit.api.compare",
    "fp4dit.evaluation",
    "fp4dit.metrics.",
    "fp4dit.pretraining.",
    "fp4dit.utils.images",
    "pipelines.search.",
    "pipelines.stages.generate",
    "pipelines.stages.score",
    "pipelines.stages.train",
)

# Prints where a module would be imported from.
FIND_PACKAGE = "import fp4dit; print(fp4dit.__file__)"

FIND_KERNELS = (
    "from fp4dit.packed.nn.kernels import find_kernels; print(find_kernels() is not None)"
)
KERNELS = f"fp4dit/packed/nn/_integer{EXTENSION_SUFFIXES[0]}"

# Imports each module of the installed packages; prints the modules and missing packages as JSON.
IMPORT_ALL = """
import importlib, json, sys
from pathlib import Path
missing = {}
root = Path(importlib.import_module("fp4dit").__file__).parents[1]
for path in sorted(path for name in sys.argv[1:] for path in (root / name).rglob("*.py")):
    name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing[name] = error.name.split(".")[0]
print(json.dumps(missing))
"""

# Loads a packed pipeline where neither Hydra nor Lightning can be imported, and draws with it.
LOAD = """
import sys
for name in ("hydra", "omegaconf", "lightning", "pytorch_lightning", "pipelines"):
    sys.modules[name] = None
import fp4dit, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float16)
options = {"num_inference_steps": 1, "output_type": "np", "use_resolution_binning": False}
layer = pipe.transformer.caption_projection.linear_1
print(type(layer).__name__, pipe("a red circle", **options).images.shape)
"""


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty folder in which its commands start."""

    root: Path
    folder: Path

    @property
    def site_packages(self) -> Path:
        return self.root / SITE_PACKAGES.relative_to(sys.prefix)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment, such as `python`."""
        variables = {key: text for key, text in os.environ.items() if not key.startswith("PYTHON")}
        return subprocess.run(
            [str(self.root / "bin" / command[0]), *command[1:]],
            cwd=self.folder,
            env=variables | {"VIRTUAL_ENV": str(self.root)},
            capture_output=True,
            text=True,
            check=False,
        )

    def read_output(self, *command: str) -> str:
        """Run a command that has to succeed, and return its output."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


def list_source_files(*names: str) -> list[str]:
    """Return the files of the checkout that are not ignored, below these names."""
    options = ["--cached", "--others", "--exclude-standard", "-z", "--", *names]
    done = subprocess.run(["git", "ls-files", *options], cwd=ROOT, capture_output=True, check=True)
    paths = sorted(set(done.stdout.decode().split("\0")) - {""})
    return [path for path in paths if (ROOT / path).exists()]


def list_required_packages(requirements: Iterable[str]) -> set[str]:
    """Return the installed distributions that these requirements need, directly or not."""
    waiting, extras_by_name = [Requirement(text) for text in requirements], {}
    while waiting:
        requirement = waiting.pop()
        name, extras = normalize_name(requirement.name), frozenset(requirement.extras)
        if name in extras_by_name and extras <= extras_by_name[name]:
            continue
        extras_by_name[name] = extras | extras_by_name.get(name, frozenset())
        for needed in map(Requirement, distribution(name).requires or ()):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras)):
                waiting.append(needed)
    return set(extras_by_name)


def link_packages(names: Iterable[str], target: Path) -> None:
    """Link to the modules and the metadata of installed distributions."""
    for name in names:
        for top in {file.parts[0] for file in distribution(name).files or ()} - {".."}:
            if not (target / top).exists():
                (target / top).symlink_to(SITE_PACKAGES / top)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that the build reads."""
    source = tmp_path_factory.mktemp("source")
    for name in list_source_files(*PACKAGES, *BUILD_FILES):
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to((ROOT / name).readlink())
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    return source


def build_wheel(source: Path, out: Path, *options: str, **variables: str) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), *options]
    done = subprocess.run(
        [*command, str(source)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    [path] = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Build the source distribution, and the wheel from that."""
    return build_wheel(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def wheel_without_kernels(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Build the wheel where the C compiler fails."""
    return build_wheel(source, tmp_path_factory.mktemp("dist"), "--wheel", CC="false")


def make_environment(root: Path, wheel: Path) -> Environment:
    venv.create(root / "venv", symlinks=True)
    environment = Environment(root / "venv", root / "folder")
    environment.folder.mkdir()
    python = str(environment.root / "bin" / "python")
    install = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, *install], check=True)
    return environment


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Environment:
    """An environment with all packages."""
    environment = make_environment(tmp_path_factory.mktemp("full"), wheel)
    # The .pth files of this folder, such as that of the checkout's own installation, are not read.
    (environment.site_packages / "packages.pth").write_text(f"{SITE_PACKAGES}\n")
    return environment


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory, wheel_without_kernels: Path) -> Environment:
    """An environment without kernels, with the packages that are required without an extra."""
    environment = make_environment(tmp_path_factory.mktemp("core"), wheel_without_kernels)
    [metadata] = environment.site_packages.glob("fp4dit-*.dist-info")
    requirements = PathDistribution(metadata).requires or ()
    names = list_required_packages(text for text in requirements if "extra ==" not in text)
    link_packages(names, environment.site_packages)
    return environment


def test_the_wheel_holds_every_file_once(wheel: Path, wheel_without_kernels: Path):
    expected = [f"pipelines/{name}" for name in list_source_files("conf")]
    for name in list_source_files(*PACKAGES):
        if name != "pipelines/conf" and not name.endswith((".c", ".h")):
            expected.append(name)
    for path, extensions in {wheel: [KERNELS], wheel_without_kernels: []}.items():
        names = [name for name in ZipFile(path).namelist() if ".dist-info/" not in name]
        assert sorted(names) == sorted([*expected, *extensions])


def test_installed_kernels_are_found(full: Environment, core: Environment):
    assert full.read_output("python", "-c", FIND_KERNELS) == "True\n"
    done = core.run("python", "-c", FIND_KERNELS)
    assert done.stdout == "False\n"
    assert "fp4dit was installed without a C compiler" in done.stderr


def test_the_installed_wheel_is_what_is_imported(full: Environment, core: Environment):
    for environment in (full, core):
        expected = environment.site_packages / "fp4dit" / "__init__.py"
        assert environment.read_output("python", "-c", FIND_PACKAGE).strip() == str(expected)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("fp4dit methods", "nvfp4_4over6"),
        ("python -m pipelines.run --help", "python -m pipelines.run"),
        ("python -m pipelines.table table=demo", "python -m pipelines.run experiment=demo_"),
        ("python -m pipelines.run dry_run=true method=rtn metrics=psnr", "Nothing was made."),
    ],
)
def test_a_command_runs_outside_a_checkout(full: Environment, command: str, expected: str):
    assert expected in full.read_output(*command.split())


def test_the_core_imports_all_but_the_modules_of_extras(core: Environment):
    missing = json.loads(core.read_output("python", "-c", IMPORT_ALL, *PACKAGES))
    assert [name for name in missing if not name.startswith(MODULES_OF_EXTRAS)] == []
    assert set(missing.values()) <= {module for modules in EXTRAS.values() for module in modules}
    assert {"fp4dit.evaluation.generate", "pipelines.stages.score"} <= set(missing)


def test_the_core_quantizes_and_loads(core: Environment):
    weights = core.site_packages / "fp4dit" / "worlds" / "shapes" / "weights"
    command = ["fp4dit", "quantize", str(weights), "--method", "nvfp4_rtn", "--out", "packed"]
    core.read_output(*command)
    output = core.read_output("python", "-c", LOAD, "packed")
    assert output.split(maxsplit=1) == ["PackedLinear", "(1, 64, 64, 3)\n"]


def test_a_command_without_its_packages_says_which_extra(core: Environment):
    done = core.run("fp4dit", "dashboard")
    assert done.returncode == 1
    assert "which is not installed: pip install 'fp4dit[dashboards]'" in done.stderr
    assert "Traceback" not in done.stderr
