"""An evaluation as the table that ``vlaquant eval`` prints: no line is longer than 100 columns."""

import textwrap
from collections.abc import Callable

from vlaquant.evaluate.figures import Compared, Figure
from vlaquant.evaluate.results import (
    ActionFigures,
    Evaluation,
    Inside,
    LanguageFigures,
    Percentiles,
    PolicyEvaluation,
    Rollouts,
    System,
)
from vlaquant.terminal import WIDTH, format_table

_MIB = 2**20

Row = tuple[str, str, str, str]


def table(result: Evaluation) -> str:
    """The result in rows of figures: of the reference, of the quantized model, and a note on the difference."""
    rows: list[Row] = [("", "reference", "quantized", "")]
    rows += _system_rows(result.system)
    if isinstance(result, PolicyEvaluation):
        rows += _action_rows(result.actions)
        rows += _inside_rows(result.inside)
        rows += [] if result.rollouts is None else _rollout_rows(result.rollouts)
        rows += [] if result.skipped is None else [("success", "not measured", "not measured", result.skipped)]
    else:
        rows += _language_rows(result.language)
    notes = [line for note in result.notes for line in textwrap.wrap(note, WIDTH, subsequent_indent="  ")]
    return "\n".join([format_table(rows), *notes])


def interval(figure: Figure, shown: Callable[[float], str]) -> str:
    """`` [low, high]``, or nothing if there is no interval."""
    if figure.low is None or figure.high is None:
        return ""
    return f" [{shown(figure.low)}, {shown(figure.high)}]"


def _with_interval(figure: Figure, shown: Callable[[float], str]) -> str:
    return shown(figure.value) + interval(figure, shown)


def _mib(value: float) -> str:
    return f"{value / _MIB:.2f} MiB"


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def _four(value: float) -> str:
    return f"{value:.4f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _both(label: str, of: Compared, shown: Callable[[float], str], note: str = "") -> Row:
    return label, shown(of.reference.value), shown(of.candidate.value), note


def _less(of: Compared, less: str, more: str) -> str:
    if not of.ratio.value:
        return ""
    return f"{1 / of.ratio.value:.2f}x {less}" if of.ratio.value <= 1 else f"{of.ratio.value:.2f}x {more}"


def _system_rows(system: System) -> list[Row]:
    rows = [_both("bytes on disk", system.disk, _mib, _less(system.disk, "smaller", "larger"))]
    if system.memory is not None:
        held = system.memory
        sizes = (("model in memory", held.tensors), ("process with it", held.resident), ("process at most", held.peak))
        rows += [_both(label, of, _mib, _less(of, "smaller", "larger")) for label, of in sizes if of is not None]
    rows += _latency_rows("latency", system.latency)
    for part, of in system.parts.items():
        calls = "" if of.calls <= 1 else f" ({of.calls} calls)"
        rows.append(_both(f"  {part}{calls}", of.p50, _ms, "median"))
    if system.rate is not None:
        rate, needed = system.rate, system.rate.needed
        note = f"at the median, in chunks of {rate.chunk}"
        if needed is not None:
            enough = "enough" if rate.slowest.candidate.value >= needed.value else "too slow"
            note += f"; at the slowest {rate.slowest.candidate.value:.1f}, {enough} for {needed.value:g}"
        rows.append(_both("actions a second", rate.median, lambda value: f"{value:.1f}", note))
    return rows


def _latency_rows(label: str, of: Percentiles) -> list[Row]:
    rows = [_both(f"{label}, median", of.p50, _ms, _less(of.p50, "faster", "slower"))]
    for name, found in (("95 %", of.p95), ("99 %", of.p99)):
        rows.append(_both(f"{label}, {name}", found, _ms, _less(found, "faster", "slower")))
    return rows


def _action_rows(found: ActionFigures) -> list[Row]:
    whole, first = found.whole_chunk, found.first_step
    count = str(found.observations)
    rows: list[Row] = [("observations", count, count, f"of {found.episodes} episodes")]
    for label, of in (("action L1", whole), ("  first step", first)):
        each = " ".join(_four(figure.value) for figure in of.l1_by_dimension)
        rows.append((label, "0", _with_interval(of.l1, _four), f"per dimension: {each}"))
    rows.append(("action MSE", "0", f"{whole.mse.value:.5f}", ""))
    if found.token_agreement is not None:
        rows.append(("equal action tokens", "100.0%", _with_interval(found.token_agreement, _share), ""))
    if found.bin_distance is not None:
        rows.append(("mean bin distance", "0", f"{found.bin_distance.value:.3f}", "of 255 bins"))
    rows.append(("gripper flips", "0.0%", _with_interval(found.gripper_flips, _share), ""))
    rows.append(_both("L1 to demonstrations", found.demonstration, _four, _apart(found.demonstration)))
    if found.boundary_jump is not None:
        rows.append(_both("jump between chunks", found.boundary_jump, _four, _ratio(found.boundary_jump)))
    if found.jerk is not None:
        rows.append(_both("jerk", found.jerk, _four, _ratio(found.jerk)))
    return rows


def _ratio(of: Compared) -> str:
    return f"ratio {_with_interval(of.ratio, _times)}"


def _apart(of: Compared) -> str:
    return f"difference {of.difference.value:+.4f}" + interval(of.difference, lambda value: f"{value:+.4f}")


def _inside_rows(inside: Inside) -> list[Row]:
    rows: list[Row] = []
    if inside.image_sensitivity is not None:
        rows.append(_both("image sensitivity", inside.image_sensitivity, _four, _ratio(inside.image_sensitivity)))
    for part, figure in inside.sqnr.items():
        count = f"{figure.count} {figure.of}"
        rows.append((f"SQNR after {part}", "", _with_interval(figure, lambda value: f"{value:.1f}") + " dB", count))
    if inside.velocity is not None:
        steps = " ".join(f"{100 * figure.value:.2f}" for figure in inside.velocity)
        rows.append(("velocity error", "", f"{_share(inside.velocity[-1].value)}", f"% by denoising step: {steps}"))
    return rows


def _language_rows(found: LanguageFigures) -> list[Row]:
    more = found.perplexity.ratio
    note = f"{100 * (more.value - 1):+.2f}%, {found.tokens} tokens"
    return [
        _both("perplexity", found.perplexity, _four, note),
        ("divergence", "0", f"{found.divergence.value:.5f}", "nats a token"),
        ("same top token", "100.0%", _with_interval(found.top1_agreement, _share), ""),
    ]


def _rollout_rows(found: Rollouts) -> list[Row]:
    def rate(figure: Figure) -> str:
        return _share(figure.value) + interval(figure, lambda value: f"{100 * value:.0f}")

    tasks = found.tasks if len(found.tasks) == 1 else {**found.tasks, f"all of {found.environment}": found.success}
    rows = [_both_rates(f"success, {task}", of, rate) for task, of in tasks.items()]
    note = f"lost {found.only_reference}, won {found.only_candidate}, McNemar p = {found.p_value.value:.2f}"
    apart = found.success.difference
    ends = interval(apart, lambda value: f"{100 * value:+.1f}")
    return [*rows, ("difference", "", f"{100 * apart.value:+.1f}%{ends}", note)]


def _both_rates(label: str, of: Compared, shown: Callable[[Figure], str]) -> Row:
    return label, shown(of.reference), shown(of.candidate), f"{of.candidate.count} paired episodes"
