"""The page in a headless Chromium: at two widths, light and dark, nothing is cut off, tiny or pale; zoom and search."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.report.__main__ import write_report
from tests.report.synthetic_log import line, simulated, write

pytestmark = pytest.mark.heavy("a browser")

# The visible texts with a size below 11 px or a contrast below 4.5:1 against the ground behind them.
POOR_TEXTS = """
() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((value) => value / 255)
      .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    const bar = element.closest("g")?.querySelector("rect.fill");
    if (element.classList.contains("inbar") && bar) return rgb(getComputedStyle(bar).fill);
    for (let one = element; one; one = one.parentElement) {
      const colour = rgb(getComputedStyle(one).backgroundColor);
      if (colour[3] === 255) return colour;
    }
  };
  const poor = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
    if (!text || !element.checkVisibility() || element.closest("script, style, title")) continue;
    const style = getComputedStyle(element), svg = element.ownerSVGElement;
    const size = parseFloat(style.fontSize) * (svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1);
    const [bright, dim] = [rgb(svg ? style.fill : style.color), ground(element)]
      .map(luminance).sort((a, b) => b - a);
    const contrast = (bright + 0.05) / (dim + 0.05);
    if (size < 11 || contrast < 4.5) poor.push(`${text}: ${size.toFixed(1)} px, ${contrast.toFixed(1)}:1`);
  }
  return poor;
}
"""
# The elements that reach beyond the window, outside of what can be scrolled.
CUT_OFF = """
() => [...document.body.querySelectorAll("*")]
  .filter((one) => !one.parentElement.closest(".scroll, .drawing"))
  .filter((one) => one.getBoundingClientRect().right > innerWidth + 1)
  .map((one) => one.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    long_id = "request-" + "0123456789abcdef" * 8
    refused = line(9.0, "request.finished", "INFO", request_id=long_id, cause="refused", error="too long " * 50)
    log = write(folder / "run.jsonl", [*simulated(60, num_blocks=200), refused])
    other = write(folder / "other.jsonl", simulated(40, seed=1, num_blocks=400))
    write_report(log, folder / "report.html", other)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser import chromium

    with chromium() as started:
        yield started


@pytest.fixture(params=["390-light", "390-dark", "1280-light", "1280-dark"])
def tab(request: pytest.FixtureRequest, browser: Any, page: Path) -> Iterator[Any]:
    width, scheme = request.param.split("-")
    opened = browser.new_page(viewport={"width": int(width), "height": 1000}, color_scheme=scheme)
    requested: list[str] = []
    problems: list[str] = []
    opened.on("request", lambda sent: requested.append(sent.url))
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.goto(page.as_uri())
    yield opened
    opened.close()
    assert requested == [page.as_uri()], "the page needs no network"
    assert problems == []


def test_it_fits_and_can_be_read(tab: Any) -> None:
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate(CUT_OFF) == []
    assert tab.evaluate(POOR_TEXTS) == []


def test_what_is_poor_is_found(tab: Any) -> None:
    tab.evaluate(
        "document.body.insertAdjacentHTML('beforeend', "
        "`<p style='font-size: 9px'>tiny</p><p style='color: #888; background: #999'>pale</p><p>good</p>`)"
    )
    assert [text.partition(":")[0] for text in tab.evaluate(POOR_TEXTS)] == ["tiny", "pale"]


def test_zoom_by_keyboard_and_by_button(tab: Any) -> None:
    section = tab.locator("section[id]").first
    plot, ticks = section.locator(".plot").first, section.locator(".ticks").first
    whole, texts = plot.get_attribute("viewBox"), ticks.text_content()
    section.get_by_role("button", name="Zoom in").focus()
    tab.keyboard.press("Enter")
    shown = [share_shown(one) for one in section.locator(".plot").all()]
    assert len(shown) > 6
    assert shown == pytest.approx([0.5] * len(shown), rel=0.01), "all charts together"
    assert ticks.text_content() != texts
    start = float(plot.get_attribute("viewBox").split()[0])
    section.get_by_role("button", name="Later").click()
    assert float(plot.get_attribute("viewBox").split()[0]) > start
    section.get_by_role("button", name="Zoom out").click()
    section.get_by_role("button", name="Zoom in").click()
    section.get_by_role("button", name="Reset").click()
    assert [float(one) for one in plot.get_attribute("viewBox").split()] == pytest.approx(
        [float(one) for one in whole.split()]
    )
    marks = [text.text_content() for text in ticks.locator("text").all()]
    assert marks[0] == "0"
    assert marks[-1].endswith(" s")


def share_shown(plot: Any) -> float:
    return float(plot.get_attribute("viewBox").split()[2]) / float(plot.get_attribute("width"))


def test_search_by_id_and_links_to_rows(tab: Any) -> None:
    box = tab.get_by_placeholder("Search the requests")
    rows = tab.locator("tr[id^='run1-request-']")
    wanted = rows.nth(1).locator("code").text_content()
    box.fill(wanted)
    visible = [row for row in rows.all() if row.is_visible()]
    assert visible
    assert all(wanted in row.text_content() for row in visible)
    visible[0].locator("a").first.click()
    assert tab.evaluate("location.hash").startswith("#run1-request-")


def test_both_runs_are_drawn_side_by_side(tab: Any) -> None:
    section = tab.locator("section", has=tab.get_by_role("heading", name="Charts of both runs"))
    names = section.locator(".panel code").all_text_contents()
    assert names[0].endswith("run.jsonl")
    assert names[1].endswith("other.jsonl")
    first, second = (section.locator("svg[role=img]").nth(index) for index in (0, 1))
    axis = [[text.text_content() for text in one.locator("text.tick").all()] for one in (first, second)]
    assert axis[0] == axis[1], "the same axes"
