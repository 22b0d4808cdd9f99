"""A report as one HTML file. Nothing in it comes from the network, and it reads the same without JavaScript."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from vlaquant.errors import EvaluationError
from vlaquant.report.chart import NARROW, WIDE, Chart, Table
from vlaquant.report.charts_models import Point, pareto
from vlaquant.report.colours import variables
from vlaquant.report.data import Report
from vlaquant.report.evaluated import Evaluation
from vlaquant.report.measured import Outliers
from vlaquant.report.sections import Section, cards, missing, sections, verdict, why
from vlaquant.report.svg import number, percent, size

_TEMPLATES = Environment(
    loader=PackageLoader("vlaquant.report", "templates"),
    autoescape=select_autoescape(["html"], default=True),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
#: In a table, for what is not known.
_NOTHING = "–"
#: Width of a drawing that stands beside another one.
_HALF = 430


def render(report: Report) -> str:
    """The page about one quantized model.

    Everything that comes from a file, such as the name of a layer, is escaped.
    """
    shown = sections(report)
    page = _TEMPLATES.get_template("report.html")
    return page.render(
        _frame(f"{report.name}: vlaquant report"),
        report=report,
        verdict=verdict(report),
        cards=cards(report),
        sections=shown,
        missing=missing(report),
        why=why(report.layers),
        kept=[layer for layer in report.layers if layer.bits is None],
        recipe=yaml.safe_dump(_without_nothing(report.recipe), sort_keys=False, allow_unicode=True),
        outliers=_hover(report.measured.outliers if report.measured is not None else None),
    )


def render_comparison(reports: Sequence[Report]) -> str:
    """A page that puts several quantized models side by side.

    Raises:
        EvaluationError: fewer than two, or two of one name.
    """
    names = [report.name for report in reports]
    if len(names) < 2 or len(set(names)) < len(names):
        raise EvaluationError(f"a comparison needs two or more outputs of different names, got {', '.join(names)}")
    charts = _comparing_charts(reports)
    words = () if charts else ("Give each model the result of its evaluation (--eval), to see size against error.",)
    shown = [
        Section("front", "Size and error", charts[0].title if charts else "Size against error", words, tuple(charts)),
        Section("figures", "Figures", "All figures", tables=(("All figures", _comparison(reports)),)),
    ]
    page = _TEMPLATES.get_template("comparison.html")
    return page.render(_frame("Comparison: vlaquant report"), reports=reports, sections=shown, missing=[])


def _frame(title: str) -> dict[str, Any]:
    return {
        "title": title,
        "light": Markup(variables(dark=False)),
        "dark": Markup(variables(dark=True)),
        "wide": WIDE,
        "narrow": NARROW,
        "half": _HALF,
        "percent": percent,
        "number": number,
        "size": size,
    }


def _hover(outliers: Outliers | None) -> Markup:
    """What the pointer is told over a map of outliers: [name, channels, before, after] of each layer, as JSON."""
    rows: list[list[Any]] = []
    if outliers is not None:
        peaks = zip(outliers.layers, outliers.channels, outliers.before, outliers.after, strict=True)
        rows = [[name, count, number(max(old)), number(max(new))] for name, count, old, new in peaks]
    return script_json(rows)


def script_json(value: object) -> Markup:
    """JSON that is safe inside a ``<script>`` element, whatever its strings hold."""
    written = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        written = written.replace(character, f"\\u{ord(character):04x}")
    return Markup(written)


def _without_nothing(value: Any) -> Any:
    """A recipe without what is not set, as one would write it."""
    if isinstance(value, Mapping):
        return {key: _without_nothing(one) for key, one in value.items() if one is not None}
    return [_without_nothing(one) for one in value] if isinstance(value, list) else value


def _action_error(evaluation: Evaluation) -> float | None:
    return evaluation.mean_l1


def _divergence(evaluation: Evaluation) -> float | None:
    return evaluation.divergence


#: Errors that models can be compared by; the first that two of them have is drawn.
_ERRORS: dict[str, Callable[[Evaluation], float | None]] = {
    "action error (mean absolute difference)": _action_error,
    "divergence from the float model, nats a token": _divergence,
}


def _comparing_charts(reports: Sequence[Report]) -> list[Chart]:
    """Size against error, of those models whose error is known."""
    for unit, error in _ERRORS.items():
        points = []
        for report in reports:
            value = None if report.evaluation is None else error(report.evaluation)
            if value is not None:
                points.append(Point(report.name, report.disk.after, value))
        if len(points) > 1:
            return [pareto(points, unit)]
    return []


_FIGURES = (
    *("model", "size", "smaller", "action error", "equal tokens", "divergence", "perplexity", "success", "p", "time"),
    *("verdict", "worst layer", "its error", "mean error", "quantizer", "stored as"),
)
_NUMBERS = {"size", "smaller", "action error", "equal tokens", "divergence", "perplexity", "p", "time"} | {
    "its error",
    "mean error",
}


def _comparison(reports: Sequence[Report]) -> Table:
    """A row for each model, without columns that none of them fills."""
    rows = [_row(report) for report in reports]
    used = [i for i in range(len(_FIGURES)) if any(row[i] != _NOTHING for row in rows)]
    heading = tuple(_FIGURES[i] for i in used)
    numbers = frozenset(place for place, name in enumerate(heading) if name in _NUMBERS)
    return Table(heading, tuple(tuple(row[i] for i in used) for row in rows), numbers)


def _row(report: Report) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for layer in report.layers:
        counts[layer.stored] = counts.get(layer.stored, 0) + 1
    worst = report.worst[0] if report.worst else None
    found = report.evaluation
    success = None if found is None or found.success is None else found.success
    kinds = [str(one.get("kind")) for one in report.recipe.get("transforms") or () if isinstance(one, Mapping)]
    quantizer = report.recipe.get("quantizer")
    kinds.append(str(quantizer.get("kind")) if isinstance(quantizer, Mapping) else "unknown")
    paired = None if success is None else success.paired
    words = None if found is None else found.perplexity
    return (
        report.name,
        size(report.disk.after),
        f"{number(report.disk.ratio)}×",
        _or_dash(None if found is None else found.mean_l1, number),
        _or_dash(None if found is None else found.agreement, percent),
        _or_dash(None if found is None else found.divergence, number),
        _or_dash(None if words is None else words.after, number),
        _NOTHING if success is None else str(success.overall.after),
        _NOTHING if paired is None else f"{paired.p_value:.2f}",
        _NOTHING if report.speed is None else f"{number(report.speed.after)} ms",
        verdict(report).words,
        _NOTHING if worst is None else worst.name,
        _or_dash(None if worst is None else worst.loss, percent),
        _or_dash(report.mean_loss, percent),
        " + ".join(kinds),
        ", ".join(f"{count} × {stored}" for stored, count in counts.items()),
    )


def _or_dash(value: float | None, shown: Callable[[float], str]) -> str:
    return _NOTHING if value is None else shown(value)
