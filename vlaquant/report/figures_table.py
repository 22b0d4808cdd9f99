"""Every figure of an evaluation as one table: what it is in both models, its unit, interval and count."""

from collections.abc import Iterator

from vlaquant.evaluate.figures import BYTES, SHARE, Compared, Figure
from vlaquant.evaluate.results import LanguageEvaluation, Percentiles, PolicyEvaluation, System
from vlaquant.report.chart import Table
from vlaquant.report.svg import number, percent, size

Row = tuple[str, str, str, str, str]
_NOTHING = "–"
#: Endings of plurals -> those of one.
_ONE = {"ies": "y", "sses": "ss", "s": ""}


def figures_table(result: PolicyEvaluation | LanguageEvaluation) -> Table:
    """All of them, in the order in which they are measured."""
    of_kind = _language(result) if isinstance(result, LanguageEvaluation) else _policy(result)
    heading = ("figure", "float", "quantized", "95 % interval", "measured on")
    return Table(heading, (*of_kind, *_system(result.system)), frozenset({1, 2}))


def _language(result: LanguageEvaluation) -> Iterator[Row]:
    found = result.language
    yield _both("perplexity", found.perplexity)
    yield _one("divergence, nats a token", found.divergence, "0")
    yield _one("same top token", found.top1_agreement, "100 %")


def _policy(result: PolicyEvaluation) -> Iterator[Row]:
    found, inside = result.actions, result.inside
    for words, errors in (("", found.whole_chunk), (", first step of the chunk", found.first_step)):
        yield _one(f"mean absolute difference of actions{words}", errors.l1, "0")
        yield _one(f"mean squared difference of actions{words}", errors.mse, "0")
    if found.token_agreement is not None:
        yield _one("equal action tokens", found.token_agreement, "100 %")
    if found.bin_distance is not None:
        yield _one("mean distance of action tokens, in bins of 255", found.bin_distance, "0")
    yield _one("gripper flips", found.gripper_flips, "0 %")
    yield _both("mean distance to the demonstrations", found.demonstration)
    if found.boundary_jump is not None:
        yield _both("mean jump between chunks", found.boundary_jump)
    if found.jerk is not None:
        yield _both("jerk: mean third difference", found.jerk)
    if inside.image_sensitivity is not None:
        yield _both("change of the action when images turn black", inside.image_sensitivity)
    for part, figure in inside.sqnr.items():
        yield _one(f"signal to noise after {part}, dB", figure, _NOTHING)
    for step, figure in enumerate(inside.velocity or (), start=1):
        yield _one(f"error of the velocity, denoising step {step}", figure, "0 %")


def _system(found: System) -> Iterator[Row]:
    yield _both("weight files", found.disk)
    if found.memory is not None:
        held = found.memory
        yield _both("tensors in memory", held.tensors)
        for words, of in (("process after one action", held.resident), ("process at most", held.peak)):
            if of is not None:
                yield _both(words, of)
    yield from _percentiles("latency", found.latency)
    for part, taken in found.parts.items():
        yield _both(f"median time in {part}", taken.p50)
    if found.rate is not None:
        yield _both("actions a second, at the median", found.rate.median)
        yield _both("actions a second, at the slowest 1 %", found.rate.slowest)


def _percentiles(words: str, of: Percentiles) -> Iterator[Row]:
    yield _both(f"median {words}", of.p50)
    yield _both(f"95th percentile of {words}", of.p95)
    yield _both(f"99th percentile of {words}", of.p99)


def shown(value: float, unit: str) -> str:
    """A value with its unit, as people read it."""
    if unit == BYTES:
        return size(value)
    if unit == SHARE:
        return percent(value)
    return number(value, 4) + (f" {unit}" if unit in {"ms", "dB", "Hz"} else "")


def _one(label: str, figure: Figure, equal: str) -> Row:
    return label, equal, shown(figure.value, figure.unit), _interval(figure), _counted(figure)


def _both(label: str, of: Compared) -> Row:
    """The interval is that of the quantized model's figure."""
    values = (shown(figure.value, figure.unit) for figure in (of.reference, of.candidate))
    before, after = values
    return label, before, after, _interval(of.candidate), _counted(of.candidate)


def _interval(figure: Figure) -> str:
    if figure.low is None or figure.high is None:
        return _NOTHING
    return f"{shown(figure.low, figure.unit)} to {shown(figure.high, figure.unit)}"


def _counted(figure: Figure) -> str:
    things = figure.of
    if figure.count == 1:
        ending = next((ending for ending in _ONE if things.endswith(ending)), None)
        things = things if ending is None else things.removesuffix(ending) + _ONE[ending]
    return f"{figure.count} {things}"
