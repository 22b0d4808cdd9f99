"""The page in a real browser: Chromium, driven by Playwright, with axe-core for what people with disabilities meet.

Skipped where one of them is missing; ``make test-browser`` installs the packages and says how to get the browser.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_reports import report

from vlaquant.report.page import render, render_comparison

BROWSER = os.environ.get("VLAQUANT_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MISSING = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; make test-browser"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium, or VLAQUANT_CHROMIUM=PATH"),
]

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script>"
LAYERS = 60


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    whole = report(LAYERS)
    wrong = report(LAYERS, names={2: HOSTILE, 3: "model." + 40 * "very_long_name."})
    written = {
        "whole": render(whole),
        "hostile": render(wrong),
        "comparison": render_comparison([whole, replace(whole, name="other", disk=replace(whole.disk, after=2e6))]),
    }
    for name, page in written.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


class Visit:
    """An open page, and everything that went wrong on it."""

    def __init__(
        self, browser: Any, path: Path, *, size: dict[str, int], theme: str = "light", script: bool = True
    ) -> None:
        self.complaints: list[str] = []
        context = browser.new_context(viewport=size, color_scheme=theme, java_script_enabled=script)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.page.goto(path.as_uri())

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:")):
            self.complaints.append(f"request: {request.url}")

    def too_wide(self) -> float:
        """Pixels that the page is wider than its window."""
        wide: float = self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        return wide

    def barriers(self) -> list[str]:
        """What axe-core finds, with everything that is folded up open."""
        from axe_playwright_python.sync_playwright import Axe

        self.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        found = Axe().run(self.page).response["violations"]
        return [f"{one['id']}: {node['html'][:200]} {node['failureSummary']}" for one in found for node in one["nodes"]]

    def shown(self) -> list[str]:
        """Names of the layers whose rows are shown, in their order."""
        names: list[str] = self.page.locator("table.plan tbody tr:not([hidden]) th").all_text_contents()
        return names


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["whole", "hostile", "comparison"])
def test_it_opens_fits_and_has_no_barriers(
    chromium: Any, pages: dict[str, Path], name: str, theme: str, size: dict[str, int]
) -> None:
    visit = Visit(chromium, pages[name], size=size, theme=theme)
    assert visit.too_wide() == 0
    assert visit.barriers() == []
    assert visit.too_wide() == 0  # with everything open
    assert visit.complaints == []


def test_the_checks_see_what_is_wrong(chromium: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    wrong = '<div style="width:900px">x</div><img src="http://127.0.0.1:9/x.png"><p style="color:#ccc">pale</p>'
    wrong += "<script>undefined.x; </script><script>alert(1)</script>"
    page = pages["whole"].read_text(encoding="utf-8").replace("</main>", f"{wrong}</main>")
    page = page.replace("img-src data:", "img-src *")
    (tmp_path / "wrong.html").write_text(page, encoding="utf-8")
    visit = Visit(chromium, tmp_path / "wrong.html", size=PHONE)
    assert visit.too_wide() > 400
    assert {one.split(":")[0] for one in visit.barriers()} >= {"image-alt", "color-contrast"}
    assert {one.split(":")[0] for one in visit.complaints} >= {"request", "error", "dialog"}


def test_the_table_is_filtered_and_sorted(chromium: Any, pages: dict[str, Path]) -> None:
    visit, shown = Visit(chromium, pages["whole"], size=DESK), report(LAYERS)
    page, status = visit.page, visit.page.locator("#count")
    everything = [layer.name for layer in shown.layers]
    assert visit.shown() == everything
    page.get_by_label("Search names and reasons").fill("layers.1 PROJ")
    assert visit.shown() == [name for name in everything if "layers.1" in name]
    assert status.text_content() == f"11 of {LAYERS} layers"
    page.get_by_label("Search names and reasons").fill("damping raised")
    assert visit.shown() == [layer.name for layer in shown.layers if layer.notes]
    page.get_by_label("Search names and reasons").fill("")
    page.get_by_label("Part", exact=True).select_option("language")
    assert visit.shown() == [layer.name for layer in shown.layers if layer.part == "language"]
    page.get_by_label("Part", exact=True).select_option("")
    page.get_by_label("Stored as", exact=True).select_option("float")
    assert visit.shown() == [everything[-1]]
    page.get_by_label("Stored as", exact=True).select_option("")
    for _ in range(2):
        page.get_by_role("button", name="error").click()
    known = [layer.name for layer in shown.worst]
    assert visit.shown() == [*known, everything[-1]]  # without an error comes last
    assert page.locator("thead th[aria-sort]").get_attribute("aria-sort") == "descending"
    page.get_by_role("button", name="layer", exact=True).click()
    assert visit.shown() == everything
    assert visit.complaints == []


def test_the_theme_is_toggled_and_remembered(chromium: Any, pages: dict[str, Path]) -> None:
    visit = Visit(chromium, pages["whole"], size=DESK, theme="dark")
    page, button = visit.page, visit.page.locator("button.theme")

    def ground() -> str:
        colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return colour

    dark, label = ground(), button.text_content()
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert (ground(), button.get_attribute("aria-pressed")) == ("rgb(255, 255, 255)", "false")
    assert button.text_content() != label
    page.reload()
    assert ground() == "rgb(255, 255, 255)"
    button.click()
    assert ground() == dark
    page.emulate_media(media="print")
    assert ground() == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert visit.complaints == []


def test_a_drawing_tells_and_leads_to_the_row(chromium: Any, pages: dict[str, Path]) -> None:
    visit, worst = Visit(chromium, pages["whole"], size=DESK), report(LAYERS).worst[0]
    page = visit.page
    dot = page.locator(f'.for-desk [data-layer="{worst.index}"] circle[r="3"]')
    dot.hover(force=True)
    assert worst.name in (page.locator("#tip").text_content() or "")
    assert page.locator("#tip").is_visible()
    dot.click(force=True)
    assert page.locator("tr.found th").text_content() == worst.name
    page.locator('.for-desk [data-map="before"]').hover()
    assert "over average" in (page.locator("#tip").text_content() or "")
    page.locator("h1").hover()
    assert page.locator("#tip").is_hidden()
    assert visit.complaints == []


def test_it_reads_without_javascript(chromium: Any, pages: dict[str, Path]) -> None:
    visit = Visit(chromium, pages["whole"], size=DESK, script=False)
    assert len(visit.shown()) == LAYERS
    assert visit.page.locator("table.plan").is_visible()
    assert visit.page.locator(".filters").is_hidden()
    assert visit.page.locator("button.theme").is_hidden()


def test_the_five_answers_are_in_the_first_view(chromium: Any, pages: dict[str, Path]) -> None:
    page = Visit(chromium, pages["whole"], size=DESK).page
    for label in ("Size on disk", "Time of one action", "Task success", "Worst layer", "Kept in float"):
        box = page.get_by_text(label, exact=True).first.bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < DESK["height"]
