"""Draw the README's screenshots of the report and of the table on a terminal.

They show the results that `make demo` left in outputs/:

    python -m pipelines.report run_missing=true
    CHROMIUM=/usr/bin/chromium python docs/scripts/draw_screenshots.py
"""

import io
import os
import subprocess
import sys
from html import escape
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from fp4dit.tables.images import stack_pictures

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
REPORT = ROOT / "outputs" / "reports" / "demo.html"
STYLE = (
    "display: inline-block; padding: 1.2rem 1.5rem; background: #16181d; color: #e8eaed; "
    "font: 14px/1.45 monospace"
)
TERMINAL = """<pre style="{}">$ python -m pipelines.table\n\n{}</pre>"""
WIDTH = 1400  # pixels


def draw_report(browser: Browser) -> None:
    """Draw the table, and below it the two worst images of the last row."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(REPORT.as_uri())
    page.locator("#images").scroll_into_view_if_needed()
    page.locator(".card").nth(2).wait_for()
    page.wait_for_timeout(500)  # until the plot above has its height
    page.evaluate("scrollTo(0, 0)")
    table_end, images_start = find_top(page, ".hint"), find_top(page, "#images-title") - 16
    shots = []
    for top, bottom in ((0, table_end), (images_start, find_top(page, ".card", 2))):
        clip: dict = {"x": 0, "y": top, "width": WIDTH, "height": bottom - top}
        screenshot = page.screenshot(full_page=True, clip=clip)  # pyright: ignore[reportArgumentType]
        shots.append(Image.open(io.BytesIO(screenshot)))
    stack_pictures(shots, gap=0).save(DOCS / "report.png")


def find_top(page: Page, selector: str, n: int = 0) -> float:
    """Return the position of the upper edge of an element, in pixels."""
    box = page.locator(selector).nth(n).bounding_box()
    assert box
    return box["y"]


def draw_terminal(browser: Browser) -> None:
    """Draw the output of `python -m pipelines.table`, without its footnotes."""
    command = [sys.executable, "-m", "pipelines.table"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heading_and_rows = "\n\n".join(text.split("\n\n")[:2])
    page = browser.new_page(viewport={"width": 1600, "height": 600})
    page.set_content(TERMINAL.format(STYLE, escape(heading_and_rows)))
    page.locator("pre").screenshot(path=DOCS / "terminal.png")


if __name__ == "__main__":
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=os.environ["CHROMIUM"], args=["--no-sandbox", "--disable-gpu"]
        )
        draw_report(chromium)
        draw_terminal(chromium)
