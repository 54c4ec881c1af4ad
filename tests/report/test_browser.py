"""Test the page of a run in Chromium, driven by playwright. The tests are skipped if either is missing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.run_folders import write_run
from var.report.page import render_page
from var.report.read import find_records

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e '.[browser]'")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path")
ARGUMENTS = [  # allow root, need no display, and do not look for updates
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-quic",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Write the page of a run whose answers contain a script, an image and a line of 3000 characters."""
    evil = "<script>document.title='run'</script><img src=http://127.0.0.1:9/x onerror=\"document.title='run'\">"
    write_run(
        tmp_path / "a", "loss.temperature=1", answers=[[0.1]] * 9, text=evil + "x" * 3000, data_report={"dropped": 4}
    )
    record = {"micro_batch": 0, "id": "r", "prompt": evil, "response": evil + "x" * 300, "weight": 3.589, "reward": 1.0}
    (tmp_path / "a" / "batches.jsonl").write_text("".join(json.dumps(record) + "\n" for _ in range(4)))
    (one,) = find_records([tmp_path]).runs
    (tmp_path / "a.html").write_text(render_page(one))
    return tmp_path / "a.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_page_is_readable_on_desktop_and_phone(browser: Any, place: Path, width: int, scheme: str) -> None:
    """Fetch only the page, run nothing, fit into the window, and have enough contrast."""
    view = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    fetched, complaints = list[str](), list[str]()
    view.on("request", lambda request: fetched.append(request.url))
    view.on("console", lambda message: complaints.append(message.text))
    view.on("pageerror", lambda error: complaints.append(str(error)))
    view.goto(place.as_uri())
    assert fetched == [place.as_uri()]
    assert complaints == []
    assert view.title() == "tiny, arithmetic, var"
    assert view.evaluate("document.documentElement.scrollWidth") == width
    for picture in view.locator("svg").all():
        box = picture.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
    shades = view.evaluate(
        "['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name].match(/\\d+/g)"
        ".slice(0, 3).reduce((sum, shade) => sum + Number(shade), 0) / 3)"
    )
    assert (shades[0] < shades[1]) == (scheme == "light")
    assert abs(shades[0] - shades[1]) > 150


def test_numbers_are_not_broken_over_lines(browser: Any, place: Path) -> None:
    """Keep numbers on one line on a phone, next to long texts that are broken anywhere."""
    view = browser.new_context(viewport={"width": 390, "height": 900}).new_page()
    view.goto(place.as_uri())
    lines = view.evaluate("""[...document.querySelectorAll('td, th')]
        .filter(cell => /^-?[\\d.]+$/.test(cell.textContent))
        .map(cell => { const range = document.createRange(); range.selectNodeContents(cell);
                       return range.getClientRects().length })""")
    assert len(lines) > 8
    assert set(lines) == {1}


def test_first_prompts_are_open_and_others_need_a_click(browser: Any, place: Path) -> None:
    view = browser.new_page()
    view.goto(place.as_uri())
    cards = view.locator("article.card")
    assert cards.count() == 9
    assert [card.is_visible() for card in cards.all()] == [True] * 6 + [False] * 3
    view.get_by_text("3 more prompts").click()
    assert all(card.is_visible() for card in cards.all())
    assert view.get_by_role("heading", name="What does not train").is_visible()
