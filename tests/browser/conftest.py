"""Fixtures that start Chromium and open pages in it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parents[2]
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
ROWS = ["Full precision", "FP4DiT", "FP4 <b id=\"run\">nearest</b> & 'co' 🙂", "Later"]

Open = Callable[..., Page]


def run_command(module: str, outputs: Path, *arguments: str) -> str:
    """Run a command of the project, and return what it prints."""
    searchpath = f"hydra.searchpath=[file://{ROOT}/tests/conf]"
    command = [
        sys.executable,
        "-m",
        f"pipelines.{module}",
        *arguments,
        searchpath,
        f"outputs={outputs}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a small table of the shipped model.

    Its last row was never run, and its third row has no histograms.
    """
    outputs = tmp_path_factory.mktemp("outputs")
    small = OmegaConf.load(ROOT / "tests" / "conf" / "table" / "small.yaml")
    full, fp4dit, nearest, _ = ([*small.base, *row.overrides] for row in small.rows)
    for row in (full, [*fp4dit, "targets=[score,histograms]"], nearest):
        run_command("run", outputs, *row)
    run_command("report", outputs, "table=small")
    return outputs / "reports" / "small.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "there is no Chromium: make test-browser installs it"
    with sync_playwright() as playwright:
        chromium_browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield chromium_browser
        chromium_browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """A function that opens a page.

    Afterwards the console must be empty, and nothing may have been requested from a network.
    """
    console_messages: list[str] = []
    pages: list[Page] = []

    def open_file(path: Path, **options) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **options})
        page.on(
            "console", lambda message: console_messages.append(f"{message.type}: {message.text}")
        )
        page.on("pageerror", lambda error: console_messages.append(f"error: {error}"))
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith(("file:", "data:"))
                else console_messages.append(f"request of {r.url}")
            ),
        )
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield open_file
    for page in pages:
        page.close()
    assert not console_messages
