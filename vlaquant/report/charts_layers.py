"""Where the bytes went, and how the error runs along the network."""

from collections.abc import Sequence
from itertools import groupby

from markupsafe import Markup

from vlaquant.report.chart import Chart, Table, wide
from vlaquant.report.colours import bits_colour, paint, part_colours
from vlaquant.report.data import Bytes, Layer
from vlaquant.report.svg import (
    Scale,
    decades,
    drawing,
    legend,
    line,
    linear,
    logarithmic,
    percent,
    quiet,
    rect,
    shortened,
    size,
    tag,
    text,
    tip,
)

_BAR, _GAP = 15, 4
#: Layers that are named in the drawing.
_NAMED = 5


def bits_label(bits: int | None) -> str:
    """``4 bits``, or ``float``."""
    return "float" if bits is None else f"{bits} bits"


def bytes_by_part(parts: Sequence[Bytes]) -> Chart:
    """Bytes of every part of the network before and after, the latter stacked by precision."""
    total: dict[int | None, int] = {}
    for part in parts:
        for bits, count in part.after.items():
            total[bits] = total.get(bits, 0) + count
    everything = [Bytes("total", sum(part.before for part in parts), total), *parts]
    kinds = sorted(total, key=lambda bits: 99 if bits is None else bits)
    rows = [
        (
            part.part,
            size(part.before),
            size(sum(part.after.values())),
            f"{part.before / max(sum(part.after.values()), 1):.2f}×",
            *(size(part.after[bits]) if bits in part.after else "–" for bits in kinds),
        )
        for part in everything
    ]
    heading = ("part", "before", "after", "smaller", *(f"of it {bits_label(bits)}" for bits in kinds))
    biggest = max(parts, key=lambda part: sum(part.after.values()), default=everything[0])
    whole = sum(total.values())
    summary = (
        f"{size(everything[0].before)} of weights became {size(whole)}. Most of what is left, "
        f"{percent(sum(biggest.after.values()) / max(whole, 1))}, is {biggest.part}."
    )
    return Chart(
        "Where the bytes went",
        summary,
        lambda width: _bytes_drawing(width, everything, kinds, summary),
        Table(heading, tuple(rows), frozenset(range(1, len(heading)))),
    )


def _bytes_drawing(width: int, parts: Sequence[Bytes], kinds: Sequence[int | None], label: str) -> Markup:
    beside = wide(width)
    left, right = (130 if beside else 0), 150 if beside else 8
    row = 2 * _BAR + _GAP + (18 if beside else 36)
    x = linear(0, max(part.before for part in parts) or 1, left, width - right)
    shapes, y = legend(["before", *map(bits_label, kinds)], ["", *map(bits_colour, kinds)], width)
    for part in parts:
        after = sum(part.after.values())
        told = f"{size(part.before)} → {size(after)}"
        weight = "600" if part.part == "total" else None
        if beside:
            shapes.append(text(left - 10, y + _BAR + 6, part.part, text_anchor="end", font_weight=weight))
        else:
            shapes.append(text(0, y + 12, f"{part.part}: {told}", font_weight=weight))
            y += 18
        shapes.append(
            rect(
                x(0),
                y + 0.5,
                x(part.before) - x(0),
                _BAR - 1,
                tip(f"{part.part} before: {size(part.before)}"),
                fill="none",
                stroke=paint("quiet"),
            )
        )
        done = 0
        for bits in kinds:
            count = part.after.get(bits, 0)
            if count:
                inner = tip(f"{part.part} after, {bits_label(bits)}: {size(count)}")
                shapes.append(
                    rect(
                        x(done),
                        y + _BAR + _GAP,
                        max(x(done + count) - x(done) - 1, 1.0),
                        _BAR,
                        inner,
                        fill=paint(bits_colour(bits)),
                    )
                )
            done += count
        if beside:
            shapes.append(text(x(part.before) + 8, y + _BAR - 3, size(part.before)))
            shapes.append(text(x(done) + 8, y + 2 * _BAR + _GAP - 3, f"{size(after)}", font_weight="600"))
        y += row - (0 if beside else 18)
    return drawing(width, y, label, *shapes)


def layer_errors(layers: Sequence[Layer], *, damaged: Sequence[str] = ()) -> Chart:
    """Error of every layer's output along the network, and what plain rounding would have given.

    Layers in ``damaged`` are marked, whatever their error.
    """
    known = [layer for layer in layers if layer.loss is not None]
    worst = sorted(known, key=lambda layer: -(layer.loss or 0.0))
    if worst:
        losses = [layer.loss or 0.0 for layer in known]
        first = worst[0]
        middle = sorted(losses)[len(losses) // 2]
        summary = (
            f"The worst of {len(known)} layers is {first.name}: {percent(first.loss or 0.0)} of its output's mean "
            f"square is error. The median layer has {percent(middle)}."
        )
        dataless = sum(layer.bits is not None and layer.loss is None for layer in layers)
        if dataless:
            summary += f" {dataless} more were quantized without data."
    else:
        summary = "No layer was measured: the recipe used no calibration data."
    rows = tuple(
        (
            str(rank),
            layer.name,
            layer.part,
            layer.stored,
            percent(layer.loss or 0.0),
            "–" if layer.loss_rtn is None else percent(layer.loss_rtn),
            _gain(layer),
        )
        for rank, layer in enumerate(worst[:20], start=1)
    )
    heading = ("rank", "layer", "part", "stored as", "error", "plain rounding", "times less")
    return Chart(
        "Error of each layer, along the network",
        summary,
        lambda width: _errors_drawing(width, layers, worst, frozenset(damaged), summary),
        Table(heading, rows, frozenset({0, 4, 5, 6})),
    )


def _gain(layer: Layer) -> str:
    if not layer.loss or layer.loss_rtn is None:
        return "–"
    return f"{layer.loss_rtn / layer.loss:.2f}×"


def _errors_drawing(
    width: int, layers: Sequence[Layer], worst: Sequence[Layer], damaged: frozenset[str], label: str
) -> Markup:
    colours = part_colours([layer.part for layer in layers])
    shown = [*colours, "plain rounding"]
    shapes, top = legend(shown, [*colours.values(), ""], width)
    top += 14
    bottom, left = top + (250 if wide(width) else 210), 56
    values = [one for layer in worst for one in (layer.loss, layer.loss_rtn) if one]
    low, high = (min(values) / 1.3, max(values) * 1.5) if values else (1e-4, 1.0)
    low, high = (low, high) if high / low > 10 else (low / 3, high * 3)
    x = linear(-0.5, max(len(layers), 1) - 0.5, left, width - 8)
    y = logarithmic(low, high, bottom, top)
    for value in decades(low, high):
        shapes += [
            line(left, y(value), width - 8, y(value)),
            quiet(left - 6, y(value) + 4, percent(value), text_anchor="end"),
        ]
    shapes += _part_bands(layers, x, top, bottom, width)
    ranks = {layer.index: rank for rank, layer in enumerate(worst[:_NAMED], start=1)}
    radius = 3.0 if (width - left) / max(len(layers), 1) > 5 else 2.0
    position = {layer.index: place for place, layer in enumerate(layers)}
    for layer in sorted(worst, key=lambda one: one.index):
        shapes.append(_dot(layer, x(position[layer.index]), y, paint(colours[layer.part]), radius))
    for layer in worst[:_NAMED]:
        shapes += _badge(str(ranks[layer.index]), x(position[layer.index]), y(layer.loss or low) - 14, width)
    for layer in layers:
        if layer.name in damaged:
            shapes.append(text(x(position[layer.index]), top + 4, "✖", text_anchor="middle", fill=paint("bad")))
    y_text = bottom + 22
    shapes.append(quiet(left, y_text, "first layer"))
    shapes.append(quiet(width - 8, y_text, "last layer", text_anchor="end"))
    room = int((width - 100) / 7)
    for layer in worst[:_NAMED]:
        y_text += 20
        shapes += _badge(str(ranks[layer.index]), 9, y_text - 4, width)
        shapes.append(text(24, y_text, f"{percent(layer.loss or 0.0)}  {shortened(layer.name, room)}"))
    return drawing(width, y_text + 8, label, *shapes)


def _part_bands(layers: Sequence[Layer], x: Scale, top: float, bottom: float, width: int) -> list[Markup]:
    """A line where one part of the network ends and the next begins, with its name where there is room."""
    shapes, place = [], 0
    for part, group in groupby(layers, key=lambda layer: layer.part):
        count = len(list(group))
        start, end = x(place - 0.5), x(place + count - 0.5)
        if place:
            shapes.append(line(start, top, start, bottom, stroke_dasharray="3 3"))
        if end - start > 7.2 * len(part) + 6:
            shapes.append(quiet(start + 4, top - 6, part))
        place += count
    shapes.append(line(x(-0.5), bottom, width - 8, bottom, stroke=paint("quiet")))
    return shapes


def _dot(layer: Layer, x: float, y: Scale, colour: str, radius: float) -> Markup:
    """A layer: a dot, with a stroke to what plain rounding would have given."""
    loss, plain = layer.loss or 0.0, layer.loss_rtn
    words = f"{layer.name} ({layer.stored}): {percent(loss)}"
    shapes = []
    if plain and abs(y(plain) - y(loss)) > 2:
        shapes += [
            line(x, y(loss), x, y(plain), stroke=colour, stroke_opacity="0.6"),
            tag("circle", cx=x, cy=y(plain), r=0.67 * radius, fill=paint("page"), stroke=colour),
        ]
    if plain:
        words += f", plain rounding {percent(plain)}"
    shapes.append(tag("circle", cx=x, cy=y(loss), r=radius, fill=colour))
    return tag("g", tip(words), *shapes, data_layer=layer.index)


def _badge(words: str, x: float, y: float, width: int) -> list[Markup]:
    """A rank in a circle, inside the drawing."""
    x = min(max(x, 9), width - 9)
    return [
        tag("circle", cx=x, cy=y, r=8.0, fill=paint("page"), stroke=paint("text")),
        text(x, y + 4, words, text_anchor="middle", font_size="11"),
    ]
