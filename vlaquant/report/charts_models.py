"""Several quantized models side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from vlaquant.report.chart import Chart, Table, wide
from vlaquant.report.colours import QUANTIZED, paint
from vlaquant.report.svg import (
    decades,
    drawing,
    line,
    linear,
    logarithmic,
    number,
    path,
    quiet,
    size,
    tag,
    text,
    ticks,
    tip,
)


@dataclass(frozen=True, slots=True)
class Point:
    """One model: its bytes on disk, and how far it is from the float one (in the unit that the chart names)."""

    name: str
    bytes: float
    error: float


def front(points: Sequence[Point]) -> list[Point]:
    """Those for which no other is at least as small and at least as good, and better in one; the smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.bytes, one.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def pareto(points: Sequence[Point], unit: str) -> Chart:
    """Size against error; a line joins the models that no other beats in both."""
    best = front(points)
    names = ", ".join(point.name for point in best)
    summary = f"Less is better in both. No other model beats {names or 'any'} in size and in {unit} at once."
    rows = tuple(
        (point.name, size(point.bytes), number(point.error), "yes" if point in best else "no")
        for point in sorted(points, key=lambda one: one.bytes)
    )
    return Chart(
        f"Size against {unit}",
        summary,
        lambda width: _pareto_drawing(width, points, best, unit, summary),
        Table(("model", "size", unit, "unbeaten"), rows, frozenset({1, 2})),
    )


def _pareto_drawing(width: int, points: Sequence[Point], best: Sequence[Point], unit: str, label: str) -> Markup:
    left, right, top = 62, 16, 24
    bottom = top + (340 if wide(width) else 280)
    sizes, errors = [point.bytes for point in points], [point.error for point in points if point.error > 0]
    span = (max(sizes) - min(sizes)) or max(sizes)
    x = linear(min(sizes) - 0.08 * span, max(sizes) + 0.12 * span, left, width - right)
    low, high = (min(errors) / 1.6, max(errors) * 1.6) if errors else (1e-3, 1.0)
    y = logarithmic(low, high, bottom, top)
    shapes = [quiet(0, 12, f"{unit} (logarithmic)")]
    for value in decades(low, high):
        shapes += [
            line(left, y(value), width - right, y(value)),
            quiet(left - 6, y(value) + 4, number(value), text_anchor="end"),
        ]
    mib = 2.0**20
    for value in ticks((min(sizes) - 0.08 * span) / mib, (max(sizes) + 0.12 * span) / mib, 6 if wide(width) else 3):
        shapes += [
            line(x(value * mib), top, x(value * mib), bottom),
            quiet(x(value * mib), bottom + 16, f"{number(value, 4)} MiB", text_anchor="middle"),
        ]
    if len(best) > 1:
        joined = [(x(point.bytes), y(point.error)) for point in best]
        shapes.append(path(joined, stroke=paint(QUANTIZED), stroke_width="2", stroke_dasharray="6 4"))
    places: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda one: one.error):
        dot = x(point.bytes), y(point.error)
        shapes += _labelled(point, dot, paint(QUANTIZED if point in best else "page"), width, places)
    return drawing(width, bottom + 26, label, *shapes)


def _labelled(
    point: Point, dot: tuple[float, float], fill: str, width: int, places: list[tuple[float, float]]
) -> list[Markup]:
    """A dot with its name, moved down until it is clear of the names before it, which ``places`` remembers."""
    x, y = dot
    line_y = y + 4
    while any(abs(line_y - other_y) < 13 and abs(x - other_x) < 7.5 * len(point.name) for other_x, other_y in places):
        line_y += 13
    places.append((x, line_y))
    anchor, at = ("end", x - 9) if x + 9 + 7 * len(point.name) > width else ("start", x + 9)
    words = f"{point.name}: {size(point.bytes)}, {number(point.error)}"
    return [
        tag("circle", tip(words), cx=x, cy=y, r=5.0, fill=fill, stroke=paint(QUANTIZED), stroke_width="2"),
        # With a rim in the colour of the page, so that lines behind it do not cross it out
        text(at, line_y, point.name, text_anchor=anchor, paint_order="stroke", stroke=paint("page"), stroke_width="5"),
    ]
