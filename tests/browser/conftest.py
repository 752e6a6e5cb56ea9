"""A real Chromium, which must start, and pages to open in it."""

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


def run(module: str, outputs: Path, *arguments: str) -> str:
    searchpath = f"hydra.searchpath=[file://{ROOT}/tests/conf]"
    command = [sys.executable, "-m", f"pipelines.{module}", *arguments, searchpath, f"outputs={outputs}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a small table of the shipped model, whose last row was never run, and the third has no histograms."""
    outputs = tmp_path_factory.mktemp("outputs")
    small = OmegaConf.load(ROOT / "tests" / "conf" / "table" / "small.yaml")
    full, fp4dit, nearest, _ = ([*small.base, *row.overrides] for row in small.rows)
    for row in (full, [*fp4dit, "targets=[score,histograms]"], nearest):
        run("run", outputs, *row)
    run("report", outputs, "table=small")
    return outputs / "reports" / "small.html"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert chromium, "there is no Chromium: make test-browser installs it"
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield found
        found.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a page. After the test: the console had nothing to say, and nothing was asked of anybody else."""
    heard: list[str] = []
    pages: list[Page] = []

    def go(path: Path, **given) -> Page:
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **given})
        page.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: heard.append(f"error: {error}"))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else heard.append(f"asked {r.url}"))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert not heard
