"""What reaches the robot: actions, success, and the time that an action takes."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from vlaquant.evaluate.results import ActionFigures
from vlaquant.report.chart import Chart, Table, wide
from vlaquant.report.colours import FLOAT, QUANTIZED, paint, part_colours
from vlaquant.report.evaluated import Benchmark, Rate, Success, Task, Version
from vlaquant.report.measured import Trace
from vlaquant.report.svg import (
    Scale,
    drawing,
    legend,
    line,
    linear,
    number,
    path,
    quiet,
    rect,
    signed,
    tag,
    text,
    ticks,
    tip,
)

_ROW = 30


def action_errors(actions: ActionFigures) -> Chart:
    """Mean absolute difference of actions, by dimension."""
    l1 = [figure.value for figure in actions.whole_chunk.l1_by_dimension]
    worst = max(range(len(l1)), key=lambda i: l1[i])
    summary = (
        f"Dimension {worst} differs most, by {number(l1[worst])} on average over {actions.observations} recorded "
        "observations (in the robot's units)."
    )
    rows = tuple(
        (f"dimension {i}", number(value), number(figure.value))
        for i, (value, figure) in enumerate(zip(l1, actions.whole_chunk.mse_by_dimension, strict=True))
    )
    return Chart(
        "Error of each dimension of the action",
        summary,
        lambda width: _bars(width, [(f"dim {i}", value, number(value)) for i, value in enumerate(l1)], summary),
        Table(("dimension", "mean absolute difference", "mean squared difference"), rows, frozenset({1, 2})),
    )


def _bars(width: int, rows: Sequence[tuple[str, float, str]], label: str) -> Markup:
    left, right = 64, 84
    x = linear(0, max((value for _, value, _ in rows), default=0.0) or 1.0, left, width - right)
    shapes = []
    for i, (name, value, words) in enumerate(rows):
        y = i * 24.0
        shapes += [
            text(left - 8, y + 15, name, text_anchor="end"),
            rect(left, y + 3, x(value) - left, 16, tip(f"{name}: {words}"), fill=paint(QUANTIZED)),
            text(x(value) + 6, y + 15, words),
        ]
    shapes.append(line(left, 0, left, len(rows) * 24, stroke=paint("quiet")))
    return drawing(width, len(rows) * 24 + 4, label, *shapes)


def action_trace(trace: Trace) -> Chart:
    """Float and quantized actions along one recorded episode, a panel for each dimension."""
    steps = len(trace.original)
    dimensions = range(len(trace.original[0]))
    gaps = [
        (abs(trace.original[step][d] - trace.quantized[step][d]), step, d) for step in range(steps) for d in dimensions
    ]
    gap, step, dimension = max(gaps)
    mean = sum(one for one, _, _ in gaps) / len(gaps)
    summary = (
        f"Episode {trace.episode} of {trace.task or 'the recordings'} (“{trace.instruction}”): of {trace.of_episodes} "
        f"episodes, the one in which the policies differ most. They differ by {number(mean)} on average, and by "
        f"{number(gap)} at most: in dimension {dimension}, at observation {step}."
    )
    heading = ["observation"]
    for d in dimensions:
        heading += [f"dim {d} float", f"dim {d} quantized"]
    rows = tuple(
        (str(step), *(number(one[step][d]) for d in dimensions for one in (trace.original, trace.quantized)))
        for step in range(steps)
    )
    return Chart(
        "Actions along an episode",
        summary,
        lambda width: _trace_drawing(width, trace, summary),
        Table(tuple(heading), rows, frozenset(range(len(heading)))),
    )


def _trace_drawing(width: int, trace: Trace, label: str) -> Markup:
    dimensions = len(trace.original[0])
    columns = 2 if wide(width) else 1
    across, tall = width / columns, 150.0
    shapes = [
        *_key(0, "float", FLOAT, dashed=False),
        *_key(80, "quantized", QUANTIZED, dashed=True),
        *(
            [tag("circle", cx=206.0, cy=9.0, r=2.5, fill=paint("quiet")), text(214, 13, "recorded")]
            * bool(trace.recorded)
        ),
    ]
    for d in range(dimensions):
        left, top = (d % columns) * across, 26 + (d // columns) * tall
        shapes += _panel(trace, d, left + 46, left + across - 12, top + 18, top + tall - 22)
        shapes.append(text(left + 46, top + 10, f"dimension {d}", font_weight="600"))
    return drawing(width, 30 + math.ceil(dimensions / columns) * tall, label, *shapes)


def _key(x: float, words: str, colour: str, *, dashed: bool) -> list[Markup]:
    dashes = "5 3" if dashed else None
    return [
        line(x, 9, x + 22, 9, stroke=paint(colour), stroke_width="2.5", stroke_dasharray=dashes),
        text(x + 28, 13, words),
    ]


def _panel(trace: Trace, d: int, left: float, right: float, top: float, bottom: float) -> list[Markup]:
    lines = {
        "float": [row[d] for row in trace.original],
        "quantized": [row[d] for row in trace.quantized],
        "recorded": [row[d] for row in trace.recorded],
    }
    everything = [value for values in lines.values() for value in values]
    low, high = min(everything), max(everything)
    # A dimension that hardly moves is not blown up until its noise looks like a movement
    least = 0.1 * max(abs(value) for row in (*trace.original, *trace.quantized) for value in row) or 1.0
    if high - low < least:
        low, high = (low + high - least) / 2, (low + high + least) / 2
    x, y = linear(0, max(len(trace.original) - 1, 1), left, right), linear(low, high, bottom, top)
    shapes = []
    for value in ticks(low, high, 3):
        shapes += [
            line(left, y(value), right, y(value)),
            quiet(left - 5, y(value) + 4, number(value), text_anchor="end"),
        ]
    shapes += [
        tag("circle", cx=x(i), cy=y(value), r=2.0, fill=paint("quiet")) for i, value in enumerate(lines["recorded"])
    ]
    shapes.append(_curve(lines["float"], x, y, FLOAT, None))
    shapes.append(_curve(lines["quantized"], x, y, QUANTIZED, "5 3"))
    shapes += [
        quiet(left, bottom + 15, "0"),
        quiet(right, bottom + 15, f"observation {len(trace.original) - 1}", text_anchor="end"),
    ]
    return shapes


def _curve(values: Sequence[float], x: Scale, y: Scale, colour: str, dashes: str | None) -> Markup:
    points = [(x(i), y(value)) for i, value in enumerate(values)]
    return path(points, stroke=paint(colour), stroke_width="2.2", stroke_dasharray=dashes)


def success_rates(success: Success) -> Chart:
    """Success of both policies in every task, with 95 % intervals."""
    several = len(success.tasks) > 1
    tasks = [*success.tasks, success.overall] if several else [*success.tasks]
    test = success.paired
    summary = (
        f"Success {success.overall.before} before, {success.overall.after} after. In the same episodes, "
        f"{test.only_float} were solved by the float policy alone and {test.only_quantized} by the quantized one "
        f"alone: a difference of {signed(100 * test.difference)} points [{signed(100 * test.low)}, "
        f"{signed(100 * test.high)}], McNemar p = {test.p_value:.2f}."
    )
    rows = tuple((task.name, str(task.before), str(task.after), _points(task)) for task in tasks)
    return Chart(
        "Closed-loop success",
        summary,
        lambda width: _success_drawing(width, tasks, summary),
        Table(("task", "float", "quantized", "difference in points"), rows, frozenset({3})),
    )


def _points(task: Task) -> str:
    return signed(100 * (task.after.rate - task.before.rate))


def _success_drawing(width: int, tasks: Sequence[Task], label: str) -> Markup:
    beside = wide(width)
    left, right = (180 if beside else 8), 16
    ends = [0.0, 0.2, 0.4, 0.6, 0.8]
    least = min((rate.low for task in tasks for rate in (task.before, task.after)), default=0.0)
    start = max(end for end in ends if end <= max(least, 0.0))
    x = linear(start, 1, left, width - right)
    row, top = _ROW + (8 if beside else 26), 30.0
    bottom = top + row * len(tasks)
    shapes = [*_key(0, "float", FLOAT, dashed=False), *_key(80, "quantized", QUANTIZED, dashed=False)]
    for value in ticks(start, 1.0, 4):
        anchor = "end" if value == 1.0 else "start" if value == start and not beside else "middle"
        shapes += [
            line(x(value), top, x(value), bottom),
            quiet(x(value), bottom + 16, f"{100 * value:.0f} %", text_anchor=anchor),
        ]
    y = top
    for task in tasks:
        weight = "600" if task is tasks[-1] else None
        if beside:
            shapes.append(text(left - 12, y + row / 2 + 4, task.name, text_anchor="end", font_weight=weight))
        else:
            shapes.append(text(left, y + 14, task.name, font_weight=weight))
        centre = y + (row / 2 if beside else row / 2 + 9)
        shapes += _interval(task.before, x, centre - 7, FLOAT, f"{task.name}, float: {task.before}")
        shapes += _interval(task.after, x, centre + 7, QUANTIZED, f"{task.name}, quantized: {task.after}")
        y += row
    return drawing(width, bottom + 24, label, *shapes)


def _interval(rate: Rate, x: Scale, y: float, colour: str, words: str) -> list[Markup]:
    return [
        tag(
            "g",
            tip(words),
            line(x(rate.low), y, x(rate.high), y, stroke=paint(colour), stroke_width="3"),
            tag("circle", cx=x(rate.rate), cy=y, r=5.0, fill=paint(colour), stroke=paint("page")),
        )
    ]


def latency_parts(benchmark: Benchmark) -> Chart:
    """The time of one action, stacked by part of the policy."""
    parts = list(dict.fromkeys(part for version in benchmark.versions for part in version.parts))
    action = benchmark.action
    if action is None:
        summary = "One action of each version."
    else:
        summary = (
            f"One action takes {number(action.after)} ms quantized and {number(action.before)} ms in the fastest float "
            f"version, a ratio of {action.ratio:.2f}."
        )
    summary += f" Medians on {benchmark.machine}; {benchmark.settings}."
    rows = [
        ("whole action", *(number(version.median) for version in benchmark.versions)),
        ("95th percentile", *("–" if one.p95 is None else number(one.p95) for one in benchmark.versions)),
        *((part, *(_cell(version, part) for version in benchmark.versions)) for part in parts),
    ]
    heading = ("milliseconds", *(version.label for version in benchmark.versions))
    return Chart(
        "Time of one action, by part",
        summary,
        lambda width: _latency_drawing(width, benchmark.versions, parts, summary),
        Table(heading, tuple(rows), frozenset(range(1, len(heading)))),
    )


def _cell(version: Version, part: str) -> str:
    if part not in version.parts:
        return "–"
    calls = version.calls.get(part, 0.0)
    return number(version.parts[part]) + (f" ({calls:g} calls)" if calls > 1 else "")


def _latency_drawing(width: int, versions: Sequence[Version], parts: Sequence[str], label: str) -> Markup:
    colours = part_colours(parts)
    shapes, y = legend(parts, [colours[part] for part in parts], width)
    longest = max((sum(version.parts.values()) or version.median for version in versions), default=1.0)
    x = linear(0, longest, 0, width - 80)
    for version in versions:
        shapes.append(text(0, y + 10, version.label, font_weight="600" if version.quantized else None))
        done = 0.0
        for part, taken in version.parts.items():
            words = tip(f"{version.label}, {part}: {number(taken)} ms")
            shapes.append(rect(x(done), y + 16, x(taken) - 1, 20, words, fill=paint(colours[part])))
            done += taken
        shapes.append(text(x(done or version.median) + 6, y + 31, f"{number(version.median)} ms"))
        y += 52
    return drawing(width, y, label, *shapes)
