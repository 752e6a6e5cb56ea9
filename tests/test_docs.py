"""The code, the links and the paths that the documentation shows are right.

Every Python snippet is compiled and its imports are resolved, and it is run if it needs nothing
that the reader has to supply. `test_docs_commands.py` tests the commands.
"""

import ast
import builtins
import importlib.util
import re
import symtable
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel

from fp4dit.utils.errors import UserError
from pipelines.config.resolvers import list_options
from tests.conftest import ROOT
from tests.helpers import tiny
from tests.helpers.pages import DOCS, PAGES, Block, read_blocks, remove_blocks

BLOCKS = [block for path in PAGES for block in read_blocks(path)]


# --- Python ---------------------------------------------------------------------------------------

SNIPPETS = [block for block in BLOCKS if block.info.startswith("py")]
SUPPLIED = re.compile(r"/my/|/a/|<key>|my_\w+|emoji")  # what a reader has and the project has not
SLOW = re.compile(r"fp4dit\.\w+\([^)]*prompts=")  # tests/api runs such calls


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[block.page for block in SNIPPETS])
def test_a_python_snippet_works(snippet: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = compile(snippet.code, snippet.page, "exec")
    check_imports(ast.parse(snippet.code))
    if "notest" in snippet.info:
        return
    undefined = find_undefined(snippet)
    assert undefined <= {"fp4dit", "pipe"}
    if undefined or SUPPLIED.search(snippet.code) or SLOW.search(snippet.code):
        return
    (tmp_path / "fp4dit").symlink_to(ROOT / "fp4dit")  # the weights that ship
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "snippet"})


def check_imports(tree: ast.Module) -> None:
    """Check that each import of this project finds its module and its names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and is_ours(node.module):
            module = import_module(node.module)
            for name in node.names:
                assert hasattr(module, name.name), f"{node.module} has no {name.name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fp4dit":
            assert hasattr(import_module("fp4dit"), node.attr), f"fp4dit has no {node.attr}"


def is_ours(module: str) -> bool:
    """Return True if a module belongs to this project."""
    return module.partition(".")[0] in ("fp4dit", "pipelines")


def find_undefined(snippet: Block) -> set[str]:
    """Return the names that a snippet reads and does not define."""
    module = symtable.symtable(snippet.code, snippet.page, "exec")
    read, defined, tables = set(), set(dir(builtins)), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        read |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    for symbol in module.get_symbols():
        if symbol.is_assigned() or symbol.is_imported():
            defined.add(symbol.get_name())
    return read - defined


SD3_PAGE = "docs/guides/your-model.md"


@pytest.fixture
def adapter() -> str:
    """The code of the adapter for Stable Diffusion 3."""
    [code] = [block.code for block in SNIPPETS if block.page == SD3_PAGE and "units(" in block.code]
    return code


@pytest.fixture
def check(adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write the adapter as a module; return the check of it on a model of published size."""
    (tmp_path / "my_models.py").write_text(adapter)
    monkeypatch.syspath_prepend(tmp_path)
    with init_empty_weights():
        SD3Transformer2DModel(caption_projection_dim=1152).save_config(tmp_path / "transformer")
    codes = [block.code for block in SNIPPETS if block.page == SD3_PAGE]
    [code] = [code for code in codes if "verify_adapter(" in code]
    return code.replace("/my/sd3", str(tmp_path))


def test_the_adapter_passes_the_check(check: str):
    exec(check, {})


def test_the_check_finds_a_mistake(adapter: str, check: str):
    wrong = {}
    exec(adapter.replace('arguments["timestep"]', 'arguments["timestep"] + 1'), wrong)
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


# --- Links, paths and the site --------------------------------------------------------------------

LINK = re.compile(r"\]\(([^)\s]+)\)")
REPOSITORY_PATH = re.compile(
    r"(?:fp4dit|pipelines|conf|docs|tests|benchmarks|hydra_plugins)/[\w./*-]+"
)
EXAMPLES = re.compile(r"NAME|sd3|mine|my_|brightness")  # names of files that a reader may write


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_paths_lead_to_files(path: Path):
    text = re.sub(r"`[^`]*`", "", remove_blocks(path))
    for target in LINK.findall(text):
        if not target.startswith(("http", "mailto:", "#")):
            assert (path.parent / target.partition("#")[0]).exists(), target
    for code in re.findall(r"`([^`\s]+)`", remove_blocks(path)):
        if REPOSITORY_PATH.fullmatch(code) and not EXAMPLES.search(code):
            assert list(ROOT.glob(code.rstrip("/."))), code


def test_the_navigation_lists_every_page():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(list_pages(site["nav"])) == sorted(pages)


def list_pages(nav: list | dict | str) -> Iterator[str]:
    """Yield the pages of a part of the navigation."""
    if isinstance(nav, str):
        yield nav
    else:
        for item in nav.values() if isinstance(nav, dict) else nav:
            yield from list_pages(item)


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook of MkDocs that generates parts of the reference."""
    path = DOCS / "scripts" / "generate_reference.py"
    spec = importlib.util.spec_from_file_location("generate_reference", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_option_of_conf_is_described(reference: ModuleType):
    text = reference.generate_config_groups()
    for group in reference.list_groups():
        for option in list_options(group):
            assert re.search(rf"^\| `{re.escape(option)}`.* \| [^`@].*\|$", text, re.MULTILINE), (
                option
            )


def test_generated_parts_are_complete(reference: ModuleType):
    for path in DOCS.rglob("*.md"):
        text = reference.on_page_markdown(path.read_text())
        assert "<!-- generate" not in text
    assert "| `psnr` | PSNR, dB | higher | each image |" in reference.generate_metrics()
    assert "python -m pipelines.table" in reference.generate_commands()
