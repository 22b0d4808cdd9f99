"""Just enough SVG: elements with escaped text, scales, ticks, and numbers as people write them."""

import math
import re
import textwrap
from collections.abc import Callable, Sequence

from markupsafe import Markup, escape

from vlaquant.report.colours import paint

#: A number of the data -> a place in the drawing.
Scale = Callable[[float], float]

_FONT = "font-family:system-ui,sans-serif;font-size:12px"
#: What :func:`drawing` makes.
_DRAWING = re.compile(r'<svg [^>]*viewBox="0 0 \S+ (?P<height>[^ "]+)"[^>]*>(?P<inside>.*)</svg>', re.DOTALL)
#: Pixels around a picture that stands alone, and those that a sign takes.
_MARGIN, _SIGN = 12, 6.6


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """``<name attribute="…">children</name>``; text and values are escaped, children that are Markup are not.

    Attributes that are None are left out; underscores in their names become hyphens, and one at the end goes.
    """
    written = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _value(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup("").join(escape(child) for child in children)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def _value(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def drawing(width: float, height: float, label: str, *children: str) -> Markup:
    """A whole drawing; ``label`` is what a screen reader says of it."""
    return tag(
        "svg",
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {math.ceil(height)}",
        width=width,
        height=math.ceil(height),
        role="img",
        aria_label=label,
        style=f"max-width:100%;height:auto;color:{paint('text')};{_FONT}",
    )


def captioned(picture: Markup, title: str, summary: str, width: int) -> Markup:
    """A :func:`drawing` with words above it, on a ground of its own, so that it can be read on any page."""
    found = _DRAWING.fullmatch(picture)
    assert found is not None
    lines = textwrap.wrap(summary, round((width - 2 * _MARGIN) / _SIGN))
    top = _MARGIN + 20 + 18 * len(lines) + 8
    words = [text(_MARGIN, _MARGIN + 12, title, font_weight="600", font_size="15")]
    words += [text(_MARGIN, _MARGIN + 32 + 18 * i, line) for i, line in enumerate(lines)]
    inside = tag("g", Markup(found["inside"]), transform=f"translate({_MARGIN} {top})")
    tall = top + float(found["height"]) + _MARGIN
    ground = rect(0, 0, width + 2 * _MARGIN, tall, fill=paint("page"))
    return drawing(width + 2 * _MARGIN, tall, f"{title}. {summary}", ground, *words, inside)


def text(x: float, y: float, words: str, **attributes: object) -> Markup:
    """Words that begin at x (or end or centre there: ``text_anchor``) on the line y, in the colour of the text."""
    return tag("text", words, x=x, y=y, **{"fill": "currentColor", **attributes})


def quiet(x: float, y: float, words: str, **attributes: object) -> Markup:
    """:func:`text` of less weight."""
    return text(x, y, words, **{"fill": paint("quiet"), **attributes})


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Markup:
    """A line; by default one of a grid."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, **{"stroke": paint("line"), **attributes})


def rect(x: float, y: float, width: float, height: float, *children: str, **attributes: object) -> Markup:
    """A rectangle; never of negative size."""
    return tag("rect", *children, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **attributes)


def path(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A line through points."""
    words = " ".join(f"{'M' if i == 0 else 'L'}{x:.1f} {y:.1f}" for i, (x, y) in enumerate(points))
    return tag("path", d=words, **{"fill": "none", **attributes})


def legend(labels: Sequence[str], colours: Sequence[str], width: int) -> tuple[list[Markup], float]:
    """Squares with words, in as many rows as they need, and where the drawing goes on; no colour is an empty square."""
    shapes: list[Markup] = []
    x, y = 0.0, 0.0
    for label, colour in zip(labels, colours, strict=True):
        room = 18 + 7.2 * len(label) + 14
        if x and x + room > width:
            x, y = 0.0, y + 20
        fill, stroke = (paint(colour), None) if colour else ("none", paint("quiet"))
        shapes += [
            rect(x + 0.5, y + 0.5, 11, 11, fill=fill, stroke=stroke),
            text(x + 18, y + 10.5, label),
        ]
        x += room
    return shapes, y + 28


def tip(words: str) -> Markup:
    """What is shown when the pointer is over the element that this is a child of."""
    return tag("title", words)


def linear(low: float, high: float, start: float, end: float) -> Scale:
    """[low, high] -> [start, end]."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """[low, high], both positive -> [start, end]; what is less than ``low`` is put there."""
    inner = linear(math.log10(low), math.log10(high), start, end)
    return lambda value: inner(math.log10(max(value, low)))


def ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers in [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(one for one in (1, 2, 2.5, 5, 10) if one * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def decades(low: float, high: float) -> list[float]:
    """At most seven powers of ten in [low, high], both positive; of few, also the numbers 2 and 5 times as large."""
    if high / low < 200:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        return [one * 10.0**power for power in powers for one in (1, 2, 5) if low <= one * 10.0**power <= high]
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 7))
    return [10.0**power for power in range(first, last + 1, step)]


def number(value: float, digits: int = 3) -> str:
    """So many significant digits, without exponent where that is short."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    power = math.floor(math.log10(abs(value)))
    if -5 <= power < 6:
        shown = f"{value:,.{max(digits - 1 - power, 0)}f}"
        return shown.rstrip("0").rstrip(".") if "." in shown else shown
    return f"{value:.{digits - 1}e}"


def signed(value: float) -> str:
    """With a sign and one digit after the point."""
    return f"{value:+.1f}".replace("-", "−")


def percent(share: float, digits: int = 3) -> str:
    """A share as ``12.3 %``."""
    return f"{number(100.0 * share, digits)} %"


def size(count: float) -> str:
    """Bytes as KiB, MiB or GiB."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    if count >= 0.1 * 2**20:
        return f"{count / 2**20:.2f} MiB"
    return f"{count / 2**10:.1f} KiB" if count >= 2**10 else f"{count:g} bytes"


def shortened(name: str, length: int) -> str:
    """A name that is longer than that, without its beginning: its end says which block and which layer."""
    return name if len(name) <= length else f"…{name[len(name) - length + 1 :]}"
