"""Draw the README's pictures of the report and of the table on a terminal, from what `make demo` left:

python -m pipelines.report run_missing=true
CHROMIUM=/usr/bin/chromium python docs/pictures.py
"""

import io
import os
import subprocess
import sys
from html import escape
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from fp4dit.pictures import stacked

DOCS = Path(__file__).parent
REPORT = DOCS.parent / "outputs" / "reports" / "demo.html"
STYLE = "display: inline-block; padding: 1.2rem 1.5rem; background: #16181d; color: #e8eaed; font: 14px/1.45 monospace"
TERMINAL = """<pre style="{}">$ python -m pipelines.table\n\n{}</pre>"""


def report(browser: Browser) -> None:
    """The table, and below it the two worst images of the last row."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(REPORT.as_uri())
    page.locator("#images").scroll_into_view_if_needed()
    page.locator(".card").nth(2).wait_for()
    page.wait_for_timeout(500)  # until the plot above has its height
    page.evaluate("scrollTo(0, 0)")
    edge = lambda selector, n=0: page.locator(selector).nth(n).bounding_box()["y"]  # pyright: ignore
    parts = [(0, edge(".hint")), (edge("#images-title") - 16, edge(".card", 2))]
    clips = [{"x": 0, "y": top, "width": 1400, "height": bottom - top} for top, bottom in parts]
    shots = [page.screenshot(full_page=True, clip=clip) for clip in clips]  # pyright: ignore
    stacked([Image.open(io.BytesIO(shot)) for shot in shots], gap=0).save(DOCS / "report.png")


def terminal(browser: Browser) -> None:
    command = [sys.executable, "-m", "pipelines.table"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DOCS.parent).stdout
    page = browser.new_page(viewport={"width": 1600, "height": 600})
    page.set_content(TERMINAL.format(STYLE, escape("\n\n".join(text.split("\n\n")[:2]))))
    page.locator("pre").screenshot(path=DOCS / "terminal.png")


if __name__ == "__main__":
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["CHROMIUM"], args=["--no-sandbox", "--disable-gpu"]
        )
        report(browser)
        terminal(browser)
