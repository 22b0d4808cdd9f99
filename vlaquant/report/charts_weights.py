"""What quantization met: weights on their grid, and activations that stick out."""

import base64
import io
import math
from collections.abc import Sequence

from markupsafe import Markup
from PIL import Image

from vlaquant.report.chart import Chart, Table, wide
from vlaquant.report.colours import FLOAT, QUANTIZED, paint, sequential
from vlaquant.report.measured import Outliers, WeightHistogram
from vlaquant.report.svg import drawing, line, linear, number, path, percent, quiet, rect, tag, text, tip

#: Outliers are drawn from 1 to at most 2^this, on a logarithmic scale.
_DOUBLINGS = 10
_LEVELS = 255


def weight_histogram(found: WeightHistogram) -> Chart:
    """The float weights of a layer as an area, and its codes as bars on the grid."""
    if found.error is None:
        told = "A transform mixed its weights, so that only the codes can be shown."
    else:
        told = (
            f"Rounding changed the weights by {percent(found.error)} of their square; "
            f"{percent(found.clipped)} of them lie beyond the grid."
        )
    steps = range(found.low, found.high + 1)
    shares = [_share(found, code) for code in steps]
    chosen = _some(list(range(len(shares))), 33)
    rows = tuple(
        (str(steps[i]), percent(found.codes[i]), "–" if found.error is None else percent(shares[i])) for i in chosen
    )
    return Chart(
        found.name,
        f"{found.scheme}. {told}",
        lambda width: _histogram_drawing(width, found, f"Weights of {found.name} on their grid. {told}"),
        Table(("code", "share of weights with it", "share of float weights nearest to it"), rows, frozenset({0, 1, 2})),
    )


def _share(found: WeightHistogram, code: int) -> float:
    """The float weights within half a step of a code."""
    if not found.weights:
        return 0.0
    start = (code - found.low + 1) * found.per_step - found.per_step // 2
    return sum(found.weights[start : start + found.per_step])


def _some(items: list[int], count: int) -> list[int]:
    step = max(1, math.ceil(len(items) / count))
    return items[::step]


def _histogram_drawing(width: int, found: WeightHistogram, label: str) -> Markup:
    height, left, right, top = 170, 6, 6, 24
    bottom = height - 30
    x = linear(found.low - 1, found.high + 1, left, width - right)
    density = [share * found.per_step for share in found.weights]  # share for each step, as the codes have it
    y = linear(0, max([*found.codes, *density, 1e-9]) * 1.05, bottom, top)
    steps = found.high - found.low
    thick = max(1.0, min(6.0, 0.5 * (width - left - right) / (steps + 2)))
    shapes = []
    for i, share in enumerate(found.codes):
        code = found.low + i
        words = tip(f"code {code}: {percent(share)}")
        shapes.append(
            rect(x(code) - thick / 2, y(share), thick, bottom - y(share), words, fill=paint(QUANTIZED), opacity="0.75")
        )
    if density:
        places = [x(found.low - 1 + (i + 0.5) / found.per_step) for i in range(len(density))]
        outline = list(zip(places, map(y, density), strict=True))
        shapes.append(path(outline, stroke=paint(FLOAT), stroke_width="2"))
    shapes.append(line(left, bottom, width - right, bottom, stroke=paint("quiet")))
    notch = 4 if steps < 64 else 2
    shapes += [line(x(code), bottom, x(code), bottom + notch) for code in range(found.low, found.high + 1)]
    ends = (found.low, 0, found.high)
    shapes += [quiet(x(code), bottom + 17, str(code), text_anchor="middle") for code in ends]
    shapes += [
        rect(left, 3, 11, 11, fill=paint(QUANTIZED)),
        text(left + 17, 13, "codes"),
        line(left + 66, 9, left + 84, 9, stroke=paint(FLOAT), stroke_width="2"),
        text(left + 90, 13, "float weights"),
    ]
    return drawing(width, height, label, *shapes)


def outlier_map(found: Outliers, *, folded: bool = True) -> Chart:
    """Channel × layer: how far input channels stick out, before and (if scales were ``folded``) after."""
    before = [max(row, default=0.0) for row in found.before]
    after = [max(row, default=0.0) for row in found.after]
    order = sorted(range(len(found.layers)), key=lambda i: -before[i])
    if order:
        first = order[0]
        summary = (
            f"In {found.layers[first]}, channel {found.worst_before[first]} reaches {number(before[first])} times the "
            "average channel of its layer"
        )
        summary += f"; after folding scales, the largest there is {number(after[first])} times. " if folded else ". "
        summary += f"Seen on {found.observations} recorded observations."
    else:
        summary = "No layer ran."
    rows = tuple(
        (found.layers[i], str(found.channels[i]), str(found.worst_before[i]), f"{number(before[i])}×")
        + ((f"{number(after[i])}×",) if folded else ())
        for i in order[:20]
    )
    heading = [
        "layer",
        "channels",
        "largest channel",
        "over the average channel, before",
        *(["after"] if folded else []),
    ]
    maps = [("before", found.before), *([("after", found.after)] if folded else [])]
    return Chart(
        "Activations that stick out",
        summary,
        lambda width: _maps_drawing(width, found, maps, summary),
        Table(tuple(heading), rows, frozenset({1, 2, 3, 4})),
    )


def level(ratio: float, doublings: int) -> int:
    """A ratio to the average channel as one of 256 steps from 1 to 2^doublings."""
    share = math.log2(max(ratio, 1.0)) / doublings
    return round(min(share, 1.0) * _LEVELS)


def _maps_drawing(
    width: int, found: Outliers, maps: Sequence[tuple[str, Sequence[Sequence[float]]]], label: str
) -> Markup:
    tall, y = (150 if wide(width) else 120), 0.0
    left = 8
    largest = max((value for _, rows in maps for row in rows for value in row), default=1.0)
    doublings = min(max(math.ceil(math.log2(max(largest, 1.0))), 2), _DOUBLINGS)
    shapes: list[Markup] = []
    for words, rows in maps:
        shapes.append(text(left, y + 12, f"{words}: channels ↓, layers along the network →"))
        y += 20
        shapes.append(_image((left, y, width - 2 * left, tall), rows, words, doublings))
        y += tall + 14
    shapes.append(quiet(left, y + 2, "first layer"))
    shapes.append(quiet(width - left, y + 2, "last layer", text_anchor="end"))
    y += 16
    shapes += _scale_bar(left, y, min(width - 2 * left, 360), doublings)
    return drawing(width, y + 44, label, *shapes)


def _image(
    place: tuple[float, float, float, float], rows: Sequence[Sequence[float]], which: str, doublings: int
) -> Markup:
    """A map as a small picture that the browser enlarges to ``place``: x, y, width and height."""
    x, y, width, height = place
    tallest = max((len(row) for row in rows), default=1)
    levels = bytes(level(row[i * len(row) // tallest], doublings) for i in range(tallest) for row in rows)
    picture = Image.frombytes("P", (max(len(rows), 1), tallest), levels or b"\0")
    picture.putpalette([part for i in range(_LEVELS + 1) for part in sequential(i / _LEVELS)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return tag(
        "image",
        x=x,
        y=y,
        width=width,
        height=height,
        preserveAspectRatio="none",
        style="image-rendering:pixelated",
        href=f"data:image/png;base64,{data}",
        data_map=which,
    )


def _scale_bar(x: float, y: float, width: float, doublings: int) -> list[Markup]:
    cells = 64
    shapes = []
    for i in range(cells):
        red, green, blue = sequential(i / (cells - 1))
        shapes.append(rect(x + i * width / cells, y, width / cells + 0.5, 10, fill=f"rgb({red},{green},{blue})"))
    for doubling in range(0, doublings + 1, max(1, doublings // 4)):
        anchor = "start" if doubling == 0 else "end" if doubling == doublings else "middle"
        words = f"{2**doubling}×"
        shapes.append(quiet(x + doubling / doublings * width, y + 24, words, text_anchor=anchor))
    shapes.append(quiet(x, y + 40, "peak of a channel, over the layer's average"))
    return shapes
