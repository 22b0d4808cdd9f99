"""What a page says, in which order: a verdict, five figures, sections, and what is missing and how to add it."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlaquant.report.chart import Chart, Table
from vlaquant.report.charts_actions import action_errors, action_trace, latency_parts, success_rates
from vlaquant.report.charts_layers import bytes_by_part, layer_errors
from vlaquant.report.charts_weights import outlier_map, weight_histogram
from vlaquant.report.data import Layer, Report
from vlaquant.report.evaluated import Evaluation, Pair
from vlaquant.report.figures_table import figures_table
from vlaquant.report.films import film_strips
from vlaquant.report.gates import Gate
from vlaquant.report.svg import number, percent, signed, size


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first thing that is read; ``mood`` is ``good``, ``bad`` or ``open``."""

    mood: str
    words: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One figure: what it was, what it is, and what to think of it; ``link`` leads to its section."""

    label: str
    before: str
    after: str
    note: str
    link: str


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with charts and tables under it.

    Attributes:
        anchor: where links lead.
        short: for the list of sections.
        title: the heading.
        words: paragraphs under it.
        charts: drawings, each with its table.
        tables: (label, table).
        small: charts stand side by side.
        closed: tables are folded up.
    """

    anchor: str
    short: str
    title: str
    words: tuple[str, ...] = ()
    charts: tuple[Chart, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()
    small: bool = False
    closed: bool = False


@dataclass(frozen=True, slots=True)
class Missing:
    """A section that could not be written: what would be there, and what to do for it."""

    what: str
    how: str


def verdict(report: Report) -> Verdict:
    """Whether the gates of the recipe hold, and whether a layer is damaged."""
    damaged = () if report.measured is None else report.measured.damaged
    found = [
        f"{name}: its codes do not stand for the float weights ({percent(error)} of their square is error). "
        "Do not use this checkpoint."
        for name, error in damaged
    ]
    failed = [gate for gate in report.gates if gate.passed is False]
    unknown = [gate for gate in report.gates if gate.passed is None]
    told = (*found, *map(_gate_words, (*failed, *unknown, *(gate for gate in report.gates if gate.passed))))
    if damaged:
        return Verdict("bad", f"{len(damaged)} damaged " + ("layer" if len(damaged) == 1 else "layers"), told)
    if not report.gates:
        nothing = (
            "The recipe requires nothing, so this page shows figures and gives no verdict (“require:” sets gates)."
        )
        return Verdict("open", "No gates set", (nothing,))
    if failed:
        return Verdict("bad", f"{len(failed)} of {len(report.gates)} gates failed", told)
    if unknown:
        return Verdict("open", f"{len(unknown)} of {len(report.gates)} gates were not measured", told)
    return Verdict("good", f"All {len(report.gates)} gates passed", told)


def _gate_words(gate: Gate) -> str:
    limit = (
        f"from {number(gate.limit)} to {number(1 / gate.limit)}"
        if gate.name == "image_sensitivity"
        else (f"at most {number(gate.limit)}")
    )
    if gate.value is None:
        return f"not measured: {gate.name}, {gate.about} (wanted {limit})"
    return f"{'passed' if gate.passed else 'failed'}: {gate.name}, {gate.about}: {number(gate.value)} (wanted {limit})"


def cards(report: Report) -> list[Card]:
    """Size, speed, success, the worst layer, and what stayed float."""
    return [_size_card(report), _speed_card(report), _success_card(report), _worst_card(report), _float_card(report)]


def _size_card(report: Report) -> Card:
    disk = report.disk
    return Card("Size on disk", size(disk.before), size(disk.after), _times(disk, "smaller", "larger"), "bytes")


def _times(pair: Pair, less: str, more: str) -> str:
    return f"{number(pair.ratio)}× {less}" if pair.after <= pair.before else f"{number(1 / pair.ratio)}× {more}"


def _speed_card(report: Report) -> Card:
    speed = report.speed
    if speed is None:
        return Card("Time of one action", "", "not measured", "vlaquant bench OUT --reference FLOAT --json", "missing")
    note = _times(speed, "faster", "slower")
    if report.benchmark is not None and report.benchmark.action is not None:
        return Card("Time of one action", _ms(speed.before), _ms(speed.after), f"{note} (benchmark)", "latency")
    kind = "action" if report.evaluation is None or report.evaluation.policy is not None else "window of text"
    return Card(
        f"Time of one {kind}", _ms(speed.before), _ms(speed.after), f"{note} (median of vlaquant eval)", "actions"
    )


def _ms(value: float) -> str:
    return f"{number(value)} ms"


def _success_card(report: Report) -> Card:
    evaluation = report.evaluation
    if evaluation is not None and evaluation.perplexity is not None:
        words = evaluation.perplexity
        note = f"{signed(100 * (words.after / words.before - 1))} %"
        return Card("Perplexity", number(words.before, 4), number(words.after, 4), note, "actions")
    success = None if evaluation is None else evaluation.success
    if success is None:
        why = (None if evaluation is None else evaluation.skipped) or "vlaquant eval --rollouts 20 --json"
        return Card("Task success", "", "not measured", why, "missing")
    before, after = success.overall.before, success.overall.after
    note = f"{signed(100 * (after.rate - before.rate))} points in {after.episodes} episodes"
    note += f", p = {success.paired.p_value:.2f}" + (
        ": too few to tell them apart" if success.paired.p_value >= 0.05 else ": a real difference"
    )
    return Card("Task success", _rate(before.rate), _rate(after.rate), note, "success")


def _rate(value: float) -> str:
    return f"{100 * value:.1f} %"


def _worst_card(report: Report) -> Card:
    damaged = () if report.measured is None else report.measured.damaged
    if damaged:
        name, error = damaged[0]
        return Card("Worst layer", "", name, f"damaged: {percent(error)} of its weights' square is error", "layers")
    if not report.worst:
        return Card("Worst layer", "", "not measured", "the recipe used no calibration data", "missing")
    worst = report.worst[0]
    assert worst.loss is not None
    mean = "" if report.mean_loss is None else f"; {percent(report.mean_loss)} on average"
    return Card("Worst layer", "", worst.name, f"{percent(worst.loss)} of its output is error{mean}", "layers")


def _float_card(report: Report) -> Card:
    kept = [layer for layer in report.layers if layer.bits is None]
    if not kept:
        return Card("Kept in float", "", "no layer", f"all {len(report.layers)} layers are quantized", "plan")
    reasons: dict[str, list[Layer]] = {}
    for layer in kept:
        reasons.setdefault(layer.reason, []).append(layer)
    told = sorted(reasons.items(), key=lambda item: -len(item[1]))
    note = "; ".join(f"{same[0].name if len(same) == 1 else len(same)}: {reason}" for reason, same in told[:3])
    if len(told) > 3:
        note += f"; {len(told) - 3} more reasons"
    return Card("Kept in float", "", f"{len(kept)} of {len(report.layers)} layers", note, "plan")


def sections(report: Report) -> list[Section]:
    """Everything there is to show, in order."""
    damaged = () if report.measured is None else tuple(name for name, _ in report.measured.damaged)
    chart = bytes_by_part(report.parts)
    found = [Section("bytes", "Bytes", chart.title, charts=(chart,))]
    if report.worst or damaged:
        chart = layer_errors(report.layers, damaged=damaged)
        found.append(Section("layers", "Layers", chart.title, charts=(chart,)))
    found += _inside(report)
    found += _outside(report)
    if report.benchmark is not None and report.benchmark.versions:
        chart = latency_parts(report.benchmark)
        found.append(Section("latency", "Time", chart.title, charts=(chart,)))
    if report.folds:
        found.append(_folds(report))
    return found


def _inside(report: Report) -> list[Section]:
    """Activations and weights, as far as both models were looked into."""
    measured, found = report.measured, []
    if measured is None:
        return []
    if measured.outliers is not None and measured.outliers.layers:
        chart = outlier_map(measured.outliers, folded=any(fold.kept for fold in report.folds))
        found.append(Section("outliers", "Activations", chart.title, charts=(chart,)))
    if measured.weights:
        words = (
            "Float weights in steps of their grid, and the codes that they became. The layers with the largest errors; "
            "at most 512 rows of each."
        )
        grams = tuple(weight_histogram(one) for one in measured.weights)
        found.append(Section("weights", "Weights", "Weights of the worst layers", (words,), grams, small=True))
    return found


def _outside(report: Report) -> list[Section]:
    """Actions, words and episodes, as far as they were measured."""
    evaluation, measured, found = report.evaluation, report.measured, []
    charts = []
    if evaluation is not None and evaluation.policy is not None:
        charts.append(action_errors(evaluation.policy.actions))
    if measured is not None and measured.trace is not None:
        charts.append(action_trace(measured.trace))
    tables = [] if evaluation is None else [("What vlaquant eval measured", figures_table(evaluation.result))]
    if charts or tables:
        language = evaluation is not None and evaluation.policy is None
        title = "Words" if language else "Actions"
        found.append(Section("actions", title, title, (), tuple(charts), tuple(tables)))
    success = None if evaluation is None else evaluation.success
    if evaluation is not None and success is not None:
        chart, films = success_rates(success), [film_strips(evaluation.films)] if evaluation.films else []
        found.append(Section("success", "Success", chart.title, charts=(chart, *films)))
    return found


def _differing(evaluation: Evaluation) -> int:
    """Episodes that one policy alone solved."""
    paired = None if evaluation.success is None else evaluation.success.paired
    return 0 if paired is None else paired.only_float + paired.only_quantized


def _folds(report: Report) -> Section:
    kept = sum(fold.kept for fold in report.folds)
    undone = [fold for fold in report.folds if fold.reverted is not None]
    words = [f"{kept} of {len(report.folds)} scales lower the output error and were folded into the weights."]
    words += [f"Taken back: {fold.kind} of {fold.source}: it {fold.reverted}." for fold in undone]
    rows = tuple(
        (
            fold.source,
            fold.kind,
            ", ".join(fold.targets),
            "–" if fold.before is None else percent(fold.before),
            "–" if fold.after is None else percent(fold.after),
            "–" if fold.strength is None else number(fold.strength),
            "yes" if fold.kept and fold.reverted is None else "no",
        )
        for fold in report.folds
    )
    heading = ("from", "kind", "into", "error before", "error after", "strength", "kept")
    table = Table(heading, rows, frozenset({3, 4, 5}))
    return Section(
        "scales", "Scales", "Scales that were folded", tuple(words), tables=(("All scales", table),), closed=True
    )


def why(layers: Sequence[Layer]) -> Table:
    """Layers by part, by what became of them, and by the reason."""
    groups: dict[tuple[str, str, str], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.part, layer.stored, layer.reason), []).append(layer)
    rows = tuple(
        (
            part,
            stored,
            reason,
            str(len(same)),
            size(sum(layer.bytes_before for layer in same)),
            size(sum(layer.bytes_after for layer in same)),
        )
        for (part, stored, reason), same in groups.items()
    )
    return Table(("part", "stored as", "why", "layers", "before", "after"), rows, frozenset({3, 4, 5}))


def missing(report: Report) -> list[Missing]:
    """Sections that are not there, and the commands that add them."""
    found = []
    if not report.worst:
        found.append(Missing("Error of each layer", "a recipe with calibration data measures it"))
    measured, evaluation = report.measured, report.evaluation
    if measured is None:
        found.append(Missing("Weights of the worst layers", "vlaquant report OUT --reference FLOAT"))
    if measured is None or measured.outliers is None:
        found.append(Missing("Activations, actions along an episode", "vlaquant report … --episodes EPISODES"))
    if evaluation is None:
        told = "vlaquant eval --model OUT --reference FLOAT --json FILE, then vlaquant report … --eval FILE"
        found.append(Missing("Actions and success", told))
    elif evaluation.policy is not None and evaluation.success is None:
        found.append(Missing("Closed-loop success", evaluation.skipped or "vlaquant eval … --rollouts 20"))
    if evaluation is not None and evaluation.success is not None and _differing(evaluation) and not evaluation.films:
        told = "vlaquant eval … --rollouts 20 --videos DIR, and leave DIR where it is, beside the JSON"
        found.append(Missing("Film strips of episodes that ended differently", told))
    if report.benchmark is None:
        told = "vlaquant bench OUT --reference FLOAT --json FILE, then vlaquant report … --bench FILE"
        found.append(Missing("Time of one action, by part", told))
    return found
