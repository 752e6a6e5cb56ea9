"""Reports work in a real browser."""

import json
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from playwright.sync_api import Page, expect

from fp4dit.report.images import ReportImages
from fp4dit.report.page import render_page
from fp4dit.report.row_data import RowData
from fp4dit.tables.rows import TableColumn, make_scored_row
from fp4dit.tables.table import Table
from tests.browser.conftest import ROWS, Open

SECTIONS = ("tradeoff", "images", "layers", "blocks", "values")
HOSTILE = "</script><img src=x onerror=\"document.title='run'\"> 'quoted' \"twice\" & 🙂"


def list_row_names(page: Page) -> list[str]:
    return page.locator("tbody th button").all_text_contents()


def scroll_to(page: Page, section: str) -> None:
    page.evaluate(
        "id => document.getElementById(id).scrollIntoView({behavior: 'instant'})", section
    )


def wait_for_frames(page: Page) -> None:
    """Wait until the page has drawn what its observers of scrolling have made."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def take_screenshot(page: Page, selector: str, path: Path) -> Image.Image:
    page.locator(selector).first.screenshot(path=path)
    return Image.open(path).convert("RGB")


def test_names_are_shown_and_not_run(open_page: Open, report: Path):
    page = open_page(report)
    assert list_row_names(page) == ROWS
    assert page.locator("#run").count() == 0
    assert page.locator("#table-title").text_content() == "Not complete: 3 of 4 rows"


def test_titles_sort_and_missing_numbers_stay_last(open_page: Open, report: Path):
    page = open_page(report)
    psnr = page.get_by_role("button", name="PSNR, dB", exact=True)
    column = page.locator("thead th").filter(has_text="PSNR, dB")

    def numbers() -> list[str]:
        cells = page.locator("tbody tr:not(.group)").all()
        return [
            cell.locator("td").first.locator("b, span").first.text_content() or "" for cell in cells
        ]

    psnr.click()
    expect(column).to_have_attribute("aria-sort", "descending")
    down = numbers()
    assert down[2:] == ["–", "–"]
    assert float(down[0]) > float(down[1])
    psnr.press("Enter")  # from the keyboard
    expect(column).to_have_attribute("aria-sort", "ascending")
    assert numbers() == [down[1], down[0], "–", "–"]
    psnr.click()
    assert column.get_attribute("aria-sort") is None
    assert list_row_names(page) == ROWS
    assert page.locator("tr.group th").all_text_contents() == ["W4A8", "W4A4"]


def test_rows_and_prompts_are_filtered(open_page: Open, report: Path):
    page = open_page(report)
    page.locator("#rows-filter").fill("w4a8 FP4DIT")
    assert list_row_names(page) == ["FP4DiT"]
    expect(page.locator("#rows-shown")).to_have_text("1 of 4 rows")
    scroll_to(page, "images")
    expect(page.locator(".card")).to_have_count(6)
    first = page.locator(".card h3").first.text_content() or ""
    page.locator("#prompts-filter").fill(first)
    assert set(page.locator(".card h3").all_text_contents()) == {first}
    page.locator("#prompts-filter").fill("no such words")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#prompts-shown")).to_have_text("0 of 0 prompts")


def test_a_row_opens_its_command_its_config_and_its_stages(open_page: Open, report: Path):
    page = open_page(report)
    button = page.locator("tbody th button").nth(1)
    button.focus()
    page.keyboard.press("Enter")
    expect(button).to_have_attribute("aria-expanded", "true")
    detail = page.locator("tr.detail")
    assert "pipelines.run" in (detail.locator("pre.command").first.text_content() or "")
    assert "method=fp4dit" in (detail.locator("pre.command").first.text_content() or "")
    assert "rounding:" in (detail.locator("details pre").text_content() or "")
    assert detail.locator("dd").filter(has_text="in the store").count() == 7
    page.keyboard.press("Enter")
    expect(detail).to_have_count(0)


def test_missing_results_come_with_their_command(open_page: Open, report: Path):
    page = open_page(report)
    assert "run_missing=true" in (page.locator("#empty pre").text_content() or "")
    page.locator("tbody th button").nth(3).click()
    command = page.locator("tr.detail pre.command").first.text_content() or ""
    assert "activation=e2m1_token" in command
    assert "score" in command.split("targets=")[1]
    scroll_to(page, "values")
    page.locator("#values .method").select_option("2")
    notice = page.locator("#weight .notice")
    expect(notice).to_contain_text("no histograms in the store")
    expect(notice.locator("pre")).to_contain_text("targets=[histograms]")
    page.locator("#values .method").select_option("3")
    expect(page.locator("#cards .notice")).to_contain_text(
        "has no images beside full precision in the store"
    )


def test_the_slider_divides_the_two_images(open_page: Open, report: Path, tmp_path: Path):
    """Check that one image is shown to the left of the slider, and the other to the right."""
    page = open_page(report)
    scroll_to(page, "images")
    page.locator("#images .method").select_option("2")
    page.locator("#cards .compare span").first.evaluate(
        "() => document.querySelectorAll('.compare span').forEach(e => e.remove())"
    )
    slider = page.locator("#cards input[type=range]").first
    slider.focus()
    page.keyboard.press("Home")
    assert slider.input_value() == "0"
    after = take_screenshot(page, "#cards .compare", tmp_path / "after.png")
    page.keyboard.press("End")
    before = take_screenshot(page, "#cards .compare", tmp_path / "before.png")
    assert ImageChops.difference(after, before).getbbox()
    page.keyboard.press("ArrowLeft")
    assert slider.input_value() == "99"
    box = page.locator("#cards .compare").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + 40, steps=4)
    page.mouse.up()
    assert int(slider.input_value()) == pytest.approx(25, abs=1)
    both = take_screenshot(page, "#cards .compare", tmp_path / "both.png")
    width, height = both.size
    inside = 6  # of the border, its round corners and the dividing line
    for image, left, right in (
        (before, inside, width // 4 - inside),
        (after, width // 4 + inside, width - inside),
    ):
        part = (left, inside, right, height - inside)
        assert ImageChops.difference(both.crop(part), image.crop(part)).getbbox() is None


def test_the_difference_is_dark_where_the_images_agree(
    open_page: Open, report: Path, tmp_path: Path
):
    page = open_page(report)
    scroll_to(page, "images")
    page.locator("#view").select_option("difference")
    page.locator("#gain").select_option("1")
    shown = take_screenshot(page, "#cards .compare", tmp_path / "difference.png")
    page.locator("#view").select_option("side")
    pair = take_screenshot(page, "#cards .compare", tmp_path / "pair.png")

    def brightness(image: Image.Image) -> int:
        return sum(image.convert("L").resize((1, 1), Image.Resampling.BOX).getdata())

    assert sum(shown.convert("L").histogram()[1:]) > 0
    assert brightness(shown) < brightness(pair) / 4
    assert pair.width > 1.5 * shown.width


def test_worst_images_come_first(open_page: Open, report: Path):
    page = open_page(report)
    scroll_to(page, "images")
    page.locator("#images .method").select_option("1")
    texts = page.locator(".card .meta").all_text_contents()
    scores = [float(text.split("PSNR, dB ")[1].split(" ")[0]) for text in texts]
    assert len(scores) == 6
    assert scores == sorted(scores)


def test_plots_are_drawn_and_a_layer_can_be_chosen(open_page: Open, report: Path):
    """A click on a layer of the heat map shows its values."""
    page = open_page(report)
    for section in SECTIONS:
        scroll_to(page, section)
    page.locator("#values .method").select_option("1")
    for plot in ("front", "sqnr", "errors", "curves", "weight", "activation"):
        expect(page.locator(f"#{plot} .main-svg").first).to_be_visible()
    data = json.loads(page.locator("#layers-1").text_content() or "")
    name = data["sqnr"]["layers"][12]
    page.evaluate(
        "name => document.getElementById('sqnr')"
        ".emit('plotly_click', {points: [{customdata: name}]})",
        name,
    )
    expect(page.locator("#layer")).to_have_value(name)
    assert page.locator("#weight .barlayer path").count() > 10
    lines = page.locator("#weight .shapelayer path")
    assert lines.count() == len(data["histograms"]["weight"][name]["levels"]) == 15


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(open_page: Open, report: Path, scheme: str):
    page = open_page(report, color_scheme=scheme)
    for section in SECTIONS:
        scroll_to(page, section)

    def luminance(selector: str, what: str) -> float:
        style = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        channels = [float(c) / 255 for c in style[style.index("(") + 1 : -1].split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    paper = luminance("body", "backgroundColor")
    assert (paper < 0.1) == (scheme == "dark")
    for selector, what in (
        ("h1", "color"),
        (".hint", "color"),
        ("#front .xtick text", "fill"),
        ("nav a", "color"),
    ):
        ink = luminance(selector, what)
        contrast = (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05)
        assert contrast >= 4.5, selector  # WCAG 2.2, AA
    page.locator("#theme").select_option("light" if scheme == "dark" else "dark")
    assert (luminance("body", "backgroundColor") < 0.1) == (scheme == "light")


def test_a_phone_shows_all_of_it(open_page: Open, report: Path):
    page = open_page(report, viewport={"width": 360, "height": 740}, has_touch=True)
    for section in SECTIONS:
        scroll_to(page, section)
        wait_for_frames(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator("#cards .compare").first.bounding_box()
    assert box
    assert box["width"] > 300
    page.locator("#cards .compare").first.scroll_into_view_if_needed()
    page.locator("#cards .compare").first.tap(position={"x": 90, "y": 100})
    position = page.locator("#cards input[type=range]").first.input_value()
    assert int(position) == pytest.approx(100 * 90 / box["width"], abs=1)


def write_large_page(folder: Path) -> Path:
    """Write a page of 20 rows by 64 prompts of 256 x 256 pixels, one of them with a script."""
    entries = [{"prompt": HOSTILE if i == 0 else f"prompt {i}", "seed": i} for i in range(64)]
    noise = [Image.effect_noise((256, 256), 40 + k).convert("RGB") for k in range(21)]
    row_data, rows = [], []
    for k in range(21):
        images = folder / str(k) / "images"
        images.mkdir(parents=True)
        (images.parent / "images.json").write_text(json.dumps(entries))
        for i in range(64):
            noise[(k + i) % 21].rotate(i).save(images / f"{i:05}.png", compress_level=1)
    for k in range(1, 21):
        psnr = {"mean": 30.0 + k, "low": 29.0 + k, "high": 31.0 + k}
        scores = [30.0 + (7 * i) % 64 for i in range(64)]
        metrics = {
            "n": 64,
            "metrics": {"psnr": psnr},
            "scalars": {"bits_weight": 4 + k / 9},
            "per_image": {"psnr": scores},
        }
        rows.append(make_scored_row(f"Method {k}", metrics, entries))
        row_data.append(RowData(rows[-1], "python", images=folder / str(k), reference=folder / "0"))
    columns = [
        TableColumn("psnr", "PSNR, dB", per_image=True, better="higher"),
        TableColumn("bits_weight", "Bits W"),
    ]
    table = Table(rows, columns)
    pieces = render_page(
        "large",
        table,
        row_data,
        ReportImages(row_data, worst_by="psnr"),
        {"bits_weight": columns[1]},
    )
    path = folder / "large.html"
    path.write_text("".join(pieces), encoding="utf-8")
    return path


def test_a_large_page_shows_images_as_they_are_asked_for(open_page: Open, tmp_path: Path):
    """Open 20 rows of 64 prompts, one of which must not be run as a script."""
    path = write_large_page(tmp_path)
    assert path.stat().st_size > 20e6
    page = open_page(path)
    expect(page.locator("tbody tr")).to_have_count(20)
    assert page.locator(".card").count() == 0  # so that the page opens at once
    scroll_to(page, "images")
    expect(page.locator(".card")).to_have_count(12)
    page.locator("#prompts-filter").fill("onerror")
    assert page.locator(".card h3").all_text_contents() == [HOSTILE]
    assert page.title() != "run"
    page.locator("#prompts-filter").fill("")
    page.locator("#more [data-count=all]").click()
    expect(page.locator(".card")).to_have_count(64)
