"""Drawings say what the figures say: places and sizes are read back from the SVG."""

import base64
import io
import json
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_reports import benchmark, evaluation, film, manifest, measured, report
from PIL import Image

from vlaquant.evaluate.results import from_dict
from vlaquant.plan import plan_from_dict
from vlaquant.report.chart import NARROW, WIDE
from vlaquant.report.charts_actions import action_errors, action_trace, latency_parts, success_rates
from vlaquant.report.charts_layers import bytes_by_part, layer_errors
from vlaquant.report.charts_models import Point, front, pareto
from vlaquant.report.charts_weights import outlier_map, weight_histogram
from vlaquant.report.data import bytes_of, read_report
from vlaquant.report.evaluated import read_benchmark, read_evaluation
from vlaquant.report.films import film_strips
from vlaquant.report.svg import decades, linear, logarithmic, number, percent, shortened, size, tag, ticks


def shapes(svg: str, name: str) -> list[dict[str, str]]:
    """Attributes of all elements of a kind, with the words that the pointer is told as ``tip``."""
    found = []
    for match in re.finditer(rf"<{name}\b([^>]*)>(?:<title>(.*?)</title>)?", svg):
        attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', match.group(1)))
        found.append(attributes | {"tip": match.group(2) or ""})
    return found


def charts() -> list[Any]:
    shown = report(40)
    found = measured([layer.name for layer in shown.quantized])
    assert found.outliers is not None
    assert found.trace is not None
    evaluated = read_evaluation(evaluation())
    assert evaluated.success is not None
    assert evaluated.policy is not None
    return [
        bytes_by_part(shown.parts),
        layer_errors(shown.layers),
        weight_histogram(found.weights[0]),
        outlier_map(found.outliers),
        action_errors(evaluated.policy.actions),
        film_strips([film()]),
        action_trace(found.trace),
        success_rates(evaluated.success),
        latency_parts(read_benchmark(benchmark())),
        pareto([Point("a", 2e6, 0.1), Point("b", 1e6, 0.2)], "error"),
    ]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_everything_lies_inside_its_drawing(width: int) -> None:
    for chart in charts():
        svg = str(chart.draw(width))
        _, _, across, tall = map(float, re.findall(r'viewBox="([^"]*)"', svg)[0].split())
        assert across == width
        for text in re.finditer(r"<text([^>]*)>([^<]*)</text>", svg):
            attributes = dict(re.findall(r'([\w-]+)="([^"]*)"', text.group(1)))
            x, length = float(attributes["x"]), 6.6 * len(text.group(2))
            start = x - {"end": 1.0, "middle": 0.5}.get(attributes.get("text-anchor", ""), 0.0) * length
            assert start >= -8, (chart.title, text.group(2))
            assert start + length <= width + 24, (chart.title, text.group(2))
            assert 0 <= float(attributes["y"]) <= tall, (chart.title, text.group(2))
        for rect in shapes(svg, "rect"):
            assert float(rect["x"]) + float(rect["width"]) <= width + 1, chart.title
            assert float(rect["y"]) + float(rect["height"]) <= tall, chart.title


def test_a_notebook_shows_a_chart() -> None:
    for chart in charts():
        shown = chart._repr_svg_()
        assert shown == chart.svg()
        root = ET.fromstring(shown)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        inside = "".join(root.itertext())
        assert chart.title in inside
        assert all(word in inside for word in chart.summary.split())
        assert "--vq-text,#1a1f26" in shown  # outside of a page the light colours apply
        ground = next(root.iter("{http://www.w3.org/2000/svg}rect"))
        _, _, across, tall = (float(one) for one in root.attrib["viewBox"].split())
        assert (float(ground.attrib["width"]), ground.attrib["fill"]) == (across, "var(--vq-page,#ffffff)")
        assert float(ground.attrib["height"]) == pytest.approx(tall, abs=1.0)
        assert tall > float(ET.fromstring(str(chart.draw(WIDE))).attrib["height"])
        assert chart.table.rows


def test_bytes_of_a_plan_need_no_output() -> None:
    written = manifest(20)
    made = plan_from_dict(written["plan"])
    assert bytes_of(made) == report(20).parts
    assert sum(part.before for part in bytes_of(made)) == made.bytes_before


def test_a_result_that_is_in_memory_or_in_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "vlaquant.json").write_text(json.dumps(manifest()), encoding="utf-8")
    (tmp_path / "e.json").write_text(json.dumps(evaluation()), encoding="utf-8")
    shown = read_report(folder, evaluation=from_dict(evaluation(), "made up"))
    assert shown.evaluation is not None
    other = read_report(folder, evaluation=tmp_path / "e.json").evaluation
    assert other is not None
    assert (shown.evaluation.result, shown.evaluation.success) == (other.result, other.success)


def test_bytes_add_up() -> None:
    shown = report(20)
    svg = str(bytes_by_part(shown.parts).draw(WIDE))
    bars = [bar for bar in shapes(svg, "rect") if bar["tip"].startswith("total")]
    before, *after = bars
    assert before["tip"] == f"total before: {size(shown.planned.before)}"
    wide = sum(float(bar["width"]) for bar in after)
    assert wide / float(before["width"]) == pytest.approx(shown.planned.after / shown.planned.before, abs=0.01)
    table = bytes_by_part(shown.parts).table
    assert table.rows[0][:3] == ("total", size(shown.planned.before), size(shown.planned.after))


def test_the_worst_layer_is_the_highest_and_is_named() -> None:
    shown = report(40)
    chart = layer_errors(shown.layers)
    worst = shown.worst[0]
    assert worst.loss == max(layer.loss for layer in shown.layers if layer.loss is not None)
    assert chart.table.rows[0][1] == worst.name
    assert worst.name in chart.summary
    svg = str(chart.draw(WIDE))
    groups = re.findall(r'<g data-layer="(\d+)"><title>(.*?)</title>(.*?)</g>', svg)
    heights = {int(index): float(re.findall(r'cy="([^"]*)" r="3"', inner)[0]) for index, _, inner in groups}
    assert min(heights, key=lambda index: heights[index]) == worst.index
    places = [float(re.findall(r'cx="([^"]*)" cy="[^"]*" r="3"', inner)[0]) for _, _, inner in groups]
    assert places == sorted(places)
    # Logarithmic: equal ratios are equal distances
    losses = {layer.index: layer.loss for layer in shown.layers if layer.loss is not None}
    per_decade = [
        (heights[a] - heights[b]) / math.log10(losses[b] / losses[a])
        for a, b in pairwise(losses)
        if losses[a] != losses[b]
    ]
    assert per_decade == pytest.approx([per_decade[0]] * len(per_decade), rel=0.02)


def test_a_damaged_layer_is_marked() -> None:
    shown = report(8)
    assert "✖" not in str(layer_errors(shown.layers).draw(WIDE))
    assert "✖" in str(layer_errors(shown.layers, damaged=[shown.layers[2].name]).draw(WIDE))


def test_the_map_is_the_figures() -> None:
    found = measured(["a", "b", "c"]).outliers
    assert found is not None
    svg = str(outlier_map(found).draw(WIDE))
    pictures = re.findall(r'href="data:image/png;base64,([^"]*)"', svg)
    assert len(pictures) == 2
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert picture.size == (3, 16)
        levels = np.asarray(picture).astype(float)
    ratios = np.asarray(found.before).T
    assert 255 * np.log2(ratios) / 4 == pytest.approx(levels, abs=0.51)  # at most 10 here, so up to 2^4
    assert len(re.findall("<image", str(outlier_map(found, folded=False).draw(WIDE)))) == 1


def test_success_intervals_are_where_they_should_be() -> None:
    success = read_evaluation(evaluation()).success
    assert success is not None
    svg = str(success_rates(success).draw(WIDE))
    groups = re.findall(r"<g><title>(.*?)</title>(.*?)</g>", svg)
    assert len(groups) == 6
    rates = {
        f"{task.name}, {who}": rate
        for task in success.tasks
        for who, rate in (("float", task.before), ("quantized", task.after))
    }
    x = linear(0.6, 1.0, 180, WIDE - 16)
    for words, inner in groups:
        rate = rates.get(words.split(":")[0])
        if rate is None:
            continue
        drawn = [float(value) for value in re.findall(r'(?:x1|x2|cx)="([^"]*)"', inner)]
        assert drawn == pytest.approx([x(rate.low), x(rate.high), x(rate.rate)], abs=0.02)


def test_the_trace_names_the_largest_difference() -> None:
    trace = measured(["a"]).trace
    assert trace is not None
    gaps = np.abs(np.asarray(trace.original) - np.asarray(trace.quantized))
    step, dimension = np.unravel_index(gaps.argmax(), gaps.shape)
    summary = action_trace(trace).summary
    assert f"by {number(float(gaps.max()))} at most: in dimension {dimension}, at observation {step}" in summary
    assert number(float(gaps.mean())) in summary


def beaten(point: Point, others: list[Point]) -> bool:
    """By definition: some other is no larger and no worse, and is better in one."""
    return any(
        other.bytes <= point.bytes
        and other.error <= point.error
        and (other.bytes < point.bytes or other.error < point.error)
        for other in others
    )


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nobody_beats(pairs: list[tuple[int, int]]) -> None:
    points = [Point(str(i), float(a), float(b)) for i, (a, b) in enumerate(pairs)]
    wanted = {(one.bytes, one.error) for one in points if not beaten(one, points)}
    assert {(one.bytes, one.error) for one in front(points)} == wanted


@given(st.floats(1e-7, 1e7), st.floats(1.5, 1e6))
def test_ticks_are_few_round_and_inside(low: float, times: float) -> None:
    high = low * times
    found = ticks(low, high, 5)
    assert len(found) <= 11
    assert all(low * (1 - 1e-6) <= one <= high * (1 + 1e-6) for one in found)
    assert all(low * (1 - 1e-6) <= one <= high * (1 + 1e-6) for one in decades(low, high))
    assert len(decades(low, high)) <= 9


def test_scales() -> None:
    assert linear(0, 10, 100, 200)(5) == 150
    assert linear(3, 3, 100, 200)(3) == 100
    assert logarithmic(1, 100, 0, 2)(10) == pytest.approx(1)
    assert logarithmic(1, 100, 0, 2)(0) == 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (0.00478612, "0.00479"),
        (1234567.0, "1.23e+06"),
        (12.0, "12"),
        (100.0, "100"),
        (0.5, "0.5"),
        (1e-9, "1.00e-09"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers(value: float, words: str) -> None:
    assert number(value) == words


def test_words() -> None:
    assert percent(0.12345) == "12.3 %"
    assert [size(one) for one in (12, 2048, 1024**2, 3 * 1024**3)] == ["12 bytes", "2.0 KiB", "1.00 MiB", "3.00 GiB"]
    assert shortened("abcdefghij", 5) == "…ghij"
    assert shortened("abc", 3) == "abc"
    assert tag("a", "<b>", x_=1.50, y=None, z_z='"') == '<a x="1.5" z-z="&#34;">&lt;b&gt;</a>'
