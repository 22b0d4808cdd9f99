"""Figures hold what the code of today measures, pages quote them rightly, and their colours can be seen."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import documents
import figure_numbers
import pytest
from documents import ROOT, read
from figure_results import FROM_FILES

from vlaquant.numerics import mse_observer, quantize_weight

IMAGES = ROOT / "docs" / "images"
PAGES = [ROOT / "docs" / "concepts.md", ROOT / "docs" / "zh" / "concepts.md"]


def drawn(name: str) -> dict[str, Any]:
    """What a committed figure was drawn from."""
    return figure_numbers.numbers_in(read(IMAGES / f"{name}.svg"))


@pytest.fixture(scope="module")
def measured() -> figure_numbers.Measured:
    return figure_numbers.measure()


@pytest.mark.parametrize("name", figure_numbers.FIGURES)
def test_figures_show_what_is_measured_today(name: str, measured: figure_numbers.Measured) -> None:
    today = figure_numbers.FIGURES[name](measured)["summary"]
    # Another processor adds in another order, which may move a weight that lies between two codes
    assert drawn(name)["summary"] == pytest.approx(today, rel=0.02), "make figures"


def test_a_figure_of_other_codes_is_seen(measured: figure_numbers.Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_numbers, "quantize_weight", partial(quantize_weight, observer=mse_observer))
    changed = figure_numbers.granularity(measured)["summary"]
    assert drawn("granularity")["summary"] != pytest.approx(changed, rel=0.02)


@pytest.mark.parametrize("name", FROM_FILES)
def test_results_are_those_of_the_file(name: str) -> None:
    assert drawn(name) == figure_numbers.rounded(FROM_FILES[name]()), "make figures"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages_quote_the_figures(page: Path) -> None:
    text = read(page)
    for name, wanted in figure_numbers.quoted({name: drawn(name) for name in figure_numbers.FIGURES}).items():
        paragraph = text.split(f"images/{name}.svg)\n\n")[1].split("\n\n")[0].replace("\n", " ")
        missing = [one for one in wanted if one not in paragraph]
        assert missing == [], f"{name}: {paragraph}"


def test_every_figure_is_on_a_page_and_every_image_is_drawn() -> None:
    shown = {Path(file).name for page in documents.pages() for _, file in documents.images(read(page))}
    files = {path.name for path in IMAGES.iterdir()}
    assert shown == files == {f"{name}.svg" for name in (*figure_numbers.FIGURES, *FROM_FILES)}


def luminance(colour: str) -> float:
    """Of ``#rrggbb``, as WCAG 2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("path", sorted(IMAGES.glob("*.svg")), ids=lambda path: path.stem)
def test_figures_can_be_read_on_light_and_dark_pages(path: Path) -> None:
    svg = read(path)
    assert ET.fromstring(svg).tag.endswith("svg")
    themes = re.findall(r"svg\{color:(#\w+);--paper:(#\w+)\}", svg)
    assert len(themes) == 2
    assert all(contrast(ink, paper) > 7 for ink, paper in themes)
    body = svg.split("</metadata>")[1]
    colours = set(re.findall(r"#[0-9a-f]{6}\b", body))
    for colour in colours:
        assert min(contrast(colour, paper) for _, paper in themes) > 3, colour
    assert "currentColor" in body
    assert "var(--paper)" in body
    assert path.stat().st_size < 150_000
    assert "<title>" in svg


def test_figures_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    import_name = "make_figures"
    make_figures = __import__(import_name)
    for name in ("granularity", "results"):
        svg = make_figures.draw(name, drawn(name))
        assert figure_numbers.numbers_in(svg) == json.loads(json.dumps(drawn(name)))
