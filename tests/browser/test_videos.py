"""Videos of a report play in step, and the slider divides their frames."""

import json
from pathlib import Path

import torch
from PIL import Image
from playwright.sync_api import Page, expect

from fp4dit.report.images import ReportImages
from fp4dit.report.page import render_page
from fp4dit.report.row_data import RowData
from fp4dit.tables.rows import TableColumn, make_scored_row
from fp4dit.tables.table import Table
from fp4dit.utils.images import save_image
from tests.browser.conftest import Open

FRAMES = 5


def write_page(folder: Path) -> Path:
    """Write a page of a video whose frames have a grey of their own, and red in the row's."""
    greys = torch.arange(1, FRAMES + 1).reshape(FRAMES, 1, 1, 1) / 10
    for name, colour in (("reference", [1.0, 1.0, 1.0]), ("row", [1.0, 0.0, 0.0])):
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "images.json").write_text(json.dumps([{"prompt": "fox", "seed": 0}]))
        video = greys * torch.tensor(colour).reshape(1, 3, 1, 1) * torch.ones(FRAMES, 3, 48, 64)
        save_image(video, folder / name / "images" / "00000.png")
    metrics = {"n": 1, "metrics": {}, "scalars": {}, "per_image": {"psnr": [20.0]}}
    row = make_scored_row("Method", metrics, [{"prompt": "fox", "seed": 0}])
    data = RowData(row, "python", images=folder / "row", reference=folder / "reference")
    table = Table([row], [TableColumn("psnr", "PSNR, dB", per_image=True, better="higher")])
    path = folder / "videos.html"
    path.write_text("".join(render_page("videos", table, [data], ReportImages([data]), {})))
    return path


def read_colours(page: Page, path: Path) -> tuple[tuple, tuple]:
    """Return the colours to the left and to the right of the slider, and check both halves."""
    page.locator("#cards .compare").first.screenshot(path=path)
    image = Image.open(path).convert("RGB")
    width, height = image.size
    halves = ((8, 8, width // 2 - 8, height - 40), (width // 2 + 8, 8, width - 8, height - 40))
    colours = []
    for box in halves:
        [(_, colour)] = image.crop(box).getcolors() or [(0, None)]  # the whole half is one colour
        colours.append(colour)
    return colours[0], colours[1]


def test_the_slider_divides_the_same_frame_of_two_videos(open_page: Open, tmp_path: Path):
    page = open_page(write_page(tmp_path), reduced_motion="reduce")
    page.locator("#images").scroll_into_view_if_needed()
    expect(page.locator(".card")).to_have_count(1)
    play = page.get_by_role("button", name="Play")
    expect(play).to_have_attribute("aria-pressed", "false")  # who wants less motion gets none
    for number in range(1, FRAMES + 1):
        page.locator("#frame").fill(str(number))
        assert page.locator("#frame-shown").text_content() == f"{number} of {FRAMES}"
        left, right = read_colours(page, tmp_path / "shown.png")
        grey = round(25.5 * number)
        assert max(abs(value - grey) for value in left) <= 1
        assert abs(right[0] - grey) <= 1
        assert max(right[1:]) <= 1
    play.click()
    expect(page.locator("#frame")).to_have_value("2")
    play.click()
    expect(play).to_have_attribute("aria-pressed", "false")


def test_videos_play_when_the_page_is_opened(open_page: Open, tmp_path: Path):
    page = open_page(write_page(tmp_path))
    for number in (3, 5, 2):
        expect(page.locator("#frame")).to_have_value(str(number))
    page.locator("#frame").fill("4")  # the slider of frames stops them
    expect(page.get_by_role("button", name="Play")).to_have_attribute("aria-pressed", "false")
