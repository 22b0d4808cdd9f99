"""How each command ends: what was done, what got worse, and the command to type now."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlaquant.evaluate.results import Evaluation, PolicyEvaluation
from vlaquant.plan import Plan
from vlaquant.recipe import Episodes, Recipe
from vlaquant.report import Report
from vlaquant.report.sections import verdict
from vlaquant.report.svg import number, percent, signed, size
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Scan
from vlaquant.terminal import Closing

_SHAPE = "4096x4096"


def shown(path: Path) -> str:
    """A path as one would type it here."""
    path = Path(path)
    if path.is_absolute() and path.is_relative_to(Path.cwd()):
        path = path.relative_to(Path.cwd())
    return os.fspath(path)


def after_plan(plan: Plan, words: Sequence[str]) -> Closing:
    """``words`` quantize by this plan."""
    float_bytes = plan.bytes_after - sum(one.bytes_after for one in plan.covered if one.scheme is not None)
    return Closing(
        f"{len(plan.quantized)} of {len(plan.layers)} layers would be packed, {_sizes(plan)}; nothing was changed",
        f"not known before it is done; {size(float_bytes)} of the {size(plan.bytes_after)} stay float",
        tuple(words),
    )


def quantizing(config: Path, model: Path, recipe: Recipe, *, given: bool) -> tuple[str, ...]:
    """The command that carries a plan out; ``given`` if the model is not the recipe's own."""
    words = ("vlaquant", "quantize", "--config", shown(config), *(("--model", shown(model)) if given else ()))
    return words if recipe.output is not None else (*words, "--output", f"{model.name}-{config.stem}")


def after_quantize(result: QuantizationResult, reference: Path) -> Closing:
    """A directory was written."""
    assert result.output is not None
    plan, losses = result.plan, result.manifest.get("qat", {}).get("losses")
    done = f"{len(plan.quantized)} of {len(plan.layers)} layers packed, {_sizes(plan)}; {shown(result.output)} verified"
    measured = result.manifest.get("measured")
    if measured is not None:
        worse = ", ".join(f"{name} {measured[name]:.4g} (gate {gate:g})" for name, gate in measured["require"].items())
    elif losses is not None:
        worse = f"training loss {number(losses[0])} at first, {number(losses[-1])} at last; actions were not compared"
    else:
        worse = _layer_errors([(layer.name, layer.loss) for layer in result.layers])
    return Closing(done, worse, _comparing(result.recipe, result.output, reference))


def after_inspect(directory: Path, plan: Plan, manifest: Mapping[str, Any]) -> Closing:
    """A manifest was read."""
    return Closing(
        f"{len(plan.quantized)} of {len(plan.layers)} layers are packed, {_sizes(plan)}",
        _layer_errors([(layer["name"], layer["loss"]) for layer in manifest["layers"]]),
        ("vlaquant", "report", shown(directory)),
    )


def after_evaluation(
    result: Evaluation, model: Path, reference: Path, episodes: Path | None, file: Path | None
) -> Closing:
    """Two directories were compared; ``file`` holds the result, if one does."""
    told = []
    if isinstance(result, PolicyEvaluation):
        actions = result.actions
        told.append(f"actions differ by {number(actions.whole_chunk.l1.value)} on average")
        if actions.token_agreement is not None:
            told.append(f"{percent(1.0 - actions.token_agreement.value)} of the tokens differ")
        if result.rollouts is not None:
            told.append(f"success {signed(100 * result.rollouts.success.difference.value)} points")
    else:
        words = result.language.perplexity
        change = words.candidate.value / words.reference.value - 1.0
        told.append(f"perplexity {signed(100 * change)} % ({number(words.candidate.value)})")
    return Closing(
        f"{shown(model)} compared with {shown(reference)}",
        "; ".join(told),
        _reporting(model, reference, episodes, {"eval": file}),
    )


def after_sensitivity(scan: Scan, words: Sequence[str]) -> Closing:
    """A scan was made; ``words`` quantize."""
    method = "estimated" if scan.measured is None else "measured"
    unit = "" if scan.measured is None else f" ({next(iter(scan.measured))})"
    costs = scan.costs("measured" if scan.measured is not None else "estimated")
    cost, g, c = max((cost, g, c) for g, row in enumerate(costs) for c, cost in enumerate(row))
    return Closing(
        f"{len(scan.groups)} groups of layers in {len(scan.candidates)} schemes, on {scan.samples} samples",
        f"most of all {scan.groups[g].label} in {scan.candidates[c]}: {cost:.3g} {method}{unit}",
        tuple(words),
    )


def after_bench_shapes(result: Mapping[str, Any]) -> Closing:
    """Kernels were timed."""
    rows = [row for row in result["rows"] if row["kind"] == "layer" and row["x_fp32"] is not None]
    slowest = min(rows, key=lambda row: row["x_fp32"], default=None)
    worse = "nothing to compare with"
    if slowest is not None:
        what = f"{slowest['scheme']} at {slowest['shape']}, {slowest['tokens']} tokens"
        worse = f"the least gain is {what}: {slowest['x_fp32']:.2f} times as fast as float32"
    return Closing(
        f"{len(result['rows'])} kernels, shapes and numbers of tokens timed, {len(result['left_out'])} left out",
        worse,
        ("vlaquant", "doctor"),
    )


def after_bench_action(
    result: Mapping[str, Any], model: Path, reference: Path | None, episodes: Path | None, file: Path | None
) -> Closing:
    """Actions were timed; ``file`` holds the result, if one does."""
    slowest = min(result["ratios"], key=lambda one: one["times"], default=None)
    worse = "unknown without --reference"
    if slowest is not None:
        what = f"{slowest['of']} is {slowest['times']:.2f} times as fast as {slowest['against']}"
        worse = what if slowest["times"] < 1 else f"nothing is slower; {what}"
    settings = result["settings"]
    return Closing(
        f"one action timed in {settings['rounds']} rounds, {settings['observed']}",
        worse,
        _reporting(model, reference, None if reference is None else episodes, {"bench": file}),
    )


def _reporting(
    model: Path, reference: Path | None, episodes: Path | None, files: Mapping[str, Path | None]
) -> tuple[str, ...]:
    """The command that writes a page, with these results and those that lie where these commands would put them."""
    given: dict[str, Path | None] = {"reference": reference, "episodes": episodes}
    for name in ("eval", "bench"):
        beside = _result(model, name)
        given[name] = files.get(name) or (beside if beside.is_file() else None)
    options = [word for name, path in given.items() if path is not None for word in (f"--{name}", shown(path))]
    return ("vlaquant", "report", shown(model), *options)


def _result(model: Path, name: str) -> Path:
    """Where the result of a command about a directory goes."""
    return model.with_name(f"{model.name}.{name}.json")


def after_doctor(diagnosis: Mapping[str, Any]) -> Closing:
    """Kernels were chosen."""
    rows = diagnosis["kernels"]
    slow = sum(row["slow"] for row in rows)
    return Closing(
        f"asked for the kernels of {len(rows)} schemes and dtypes",
        f"{slow} of them have only the slow reference kernel",
        ("vlaquant", "bench", "--shapes", _SHAPE),
    )


def after_report(report: Report, page: Path, model: Path, reference: Path | None, episodes: Path | None) -> Closing:
    """A page was written; next comes what is missing on it, or the page."""
    told = verdict(report)
    worst = _layer_errors([(layer.name, layer.loss) for layer in report.layers])
    command: tuple[str, ...] = _opening(page)
    if reference is not None and episodes is not None:
        both = ("--reference", shown(reference), "--episodes", shown(episodes))
        if report.evaluation is None:
            command = ("vlaquant", "eval", "--model", shown(model), *both, "--json", shown(_result(model, "eval")))
        elif report.benchmark is None:
            command = ("vlaquant", "bench", shown(model), *both, "--json", shown(_result(model, "bench")))
    return Closing(_written(page), f"{told.words}; {worst}", command)


def after_comparison(reports: Sequence[Report], page: Path) -> Closing:
    """A page with several models was written."""
    known = [(report.evaluation.mean_l1, report.name) for report in reports if report.evaluation is not None]
    errors = sorted((error, name) for error, name in known if error is not None)
    worse = "no evaluation was given (--eval)"
    if errors:
        worse = f"actions of {errors[-1][1]} differ most, by {number(errors[-1][0])} on average"
    return Closing(_written(page), worse, _opening(page))


def _sizes(plan: Plan) -> str:
    return f"{size(plan.bytes_before)} → {size(plan.bytes_after)}"


def _layer_errors(losses: Sequence[tuple[str, float | None]]) -> str:
    known = [(loss, name) for name, loss in losses if loss is not None]
    if not known:
        return "not measured: rounding without data compares nothing"
    worst, name = max(known)
    mean = sum(loss for loss, _ in known) / len(known)
    return f"output error of a layer {percent(mean)} on average, {percent(worst)} in {name}"


def _comparing(recipe: Recipe, output: Path, reference: Path) -> tuple[str, ...]:
    """What to compare the two on: held-out data, as far as the recipe knows any."""
    both = ("--model", shown(output), "--reference", shown(reference))
    file = ("--json", shown(_result(output, "eval")))
    data, asked = recipe.calibration, recipe.require
    if isinstance(data, Episodes) and (data.path / "evaluation").is_dir():
        key = () if data.unnorm_key is None else ("--unnorm-key", data.unnorm_key)
        return ("vlaquant", "eval", *both, "--episodes", shown(data.path), *key, *file)
    if data is not None and data.kind == "text" and asked is not None and asked.path is not None:
        return ("vlaquant", "eval", *both, "--text", shown(asked.path), *file)
    return ("vlaquant", "report", shown(output), "--reference", shown(reference))


def _written(page: Path) -> str:
    return f"{shown(page)}, {size(page.stat().st_size)}; it needs no network"


def _opening(page: Path) -> tuple[str, ...]:
    return ("python3", "-m", "webbrowser", shown(page))
