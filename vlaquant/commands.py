"""What each subcommand of ``vlaquant`` does: it calls one function, and says what came of it."""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vlaquant.benchmark.action import ActionSettings, bench_action
from vlaquant.benchmark.doctor import diagnose
from vlaquant.benchmark.doctor import report as doctor_report
from vlaquant.benchmark.shapes import Settings, bench_shapes, parse_schemes, parse_shapes
from vlaquant.benchmark.tables import action_table, shapes_table
from vlaquant.checkpoint import read_config, read_manifest
from vlaquant.closing import (
    after_bench_action,
    after_bench_shapes,
    after_comparison,
    after_doctor,
    after_evaluation,
    after_inspect,
    after_plan,
    after_quantize,
    after_report,
    after_sensitivity,
    quantizing,
)
from vlaquant.engine.processes import launched
from vlaquant.engine.run import RunOptions
from vlaquant.errors import RecipeError
from vlaquant.evaluate.evaluation import evaluate_language, evaluate_policy
from vlaquant.evaluate.results import Evaluation, to_dict
from vlaquant.evaluate.rollouts import ClosedLoop, default_workers
from vlaquant.evaluate.simulators import parse_simulator
from vlaquant.evaluate.table import table as evaluation_table
from vlaquant.goals.plotting import check_plot, plot_curve, plot_scan
from vlaquant.pipeline import plan, progressive, quantize
from vlaquant.plan import Plan, plan_from_dict
from vlaquant.recipe import Budget, Recipe, load_recipe
from vlaquant.report import Measured, Report, measure, read_report, render, render_comparison
from vlaquant.report.sections import cards, verdict
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Method, mix, sensitivity
from vlaquant.terminal import STDOUT, Outcome, bar, format_table
from vlaquant.training import Training, finetune


def _model_directory(args: argparse.Namespace, recipe_model: Path | None) -> Path:
    model: Path | None = args.model or recipe_model
    if model is None:
        raise RecipeError(f"{args.config}: names no model; add `model:` to it or give --model DIR")
    return model


def run_quantize(args: argparse.Namespace) -> Outcome | None:
    """Quantize, or show the plan."""
    recipe = load_recipe(args.config)
    model = _model_directory(args, recipe.model)
    rank, _ = launched()
    if args.dry_run:
        return _planned(plan(model, recipe), args, recipe, model) if rank == 0 else None
    output = args.output or recipe.output
    if output is None:
        raise RecipeError(f"{args.config}: names no output; add `output:` to it or give --output DIR")
    options = RunOptions(max_memory=args.max_memory, mode=args.mode, device=args.device, log=args.log)
    result = quantize(
        model, recipe, output=output, options=options, overwrite=args.overwrite, resume=args.resume, progress=True
    )
    return _written(result, model) if rank == 0 else None


def run_qat(args: argparse.Namespace) -> Outcome:
    """Fine-tune with rounded weights."""
    recipe = load_recipe(args.config)
    training = Training(args.steps, args.learning_rate, args.batch, args.follow)
    model = _model_directory(args, recipe.model)
    result = finetune(model, recipe, training, output=args.output, overwrite=args.overwrite, progress=True)
    return _written(result, model)


def _written(result: QuantizationResult, model: Path) -> Outcome:
    return Outcome(str(result), result.manifest, after_quantize(result, model))


def run_plan(args: argparse.Namespace) -> Outcome:
    """Show what a recipe would do."""
    recipe = load_recipe(args.config)
    model = _model_directory(args, recipe.model)
    return _planned(plan(model, recipe), args, recipe, model)


def _planned(made: Plan, args: argparse.Namespace, recipe: Recipe, model: Path) -> Outcome:
    words = quantizing(args.config, model, recipe, given=args.model is not None)
    text = made.layer_table() if getattr(args, "layers", False) else str(made)
    document = {"kind": "plan", "bytes_before": made.bytes_before, "bytes_after": made.bytes_after} | made.to_dict()
    return Outcome(text, document, after_plan(made, words))


def run_sensitivity(args: argparse.Namespace) -> Outcome:
    """Show what each scheme does to each layer."""
    recipe = load_recipe(args.config)
    model = _model_directory(args, recipe.model)
    if args.samples is not None:
        if args.samples < 1:
            raise RecipeError("--samples must be positive")
        budget = (recipe.budget or Budget()).model_copy(update={"samples": args.samples})
        recipe = recipe.model_copy(update={"budget": budget})
    if args.plot is not None:
        check_plot(args.plot)
    options = RunOptions(device=args.device)
    words = quantizing(args.config, model, recipe, given=args.model is not None)
    if args.progressive:
        scan, curve = progressive(model, recipe, options=options, progress=True)
        if args.plot is not None:
            plot_curve(curve, args.plot)
        document = scan.to_dict() | {"progressive": curve.to_dict()}
        return Outcome(f"{curve}\n\n{curve.best}", document, after_sensitivity(scan, words))
    every: tuple[Method, ...] = ("estimated", "measured")
    methods = [one for one in every if getattr(args, one)] or every
    scan = sensitivity(model, recipe, methods=methods, options=options, progress=True)
    if args.plot is not None:
        plot_scan(scan, args.plot)
    text = str(scan)
    if recipe.budget is not None and recipe.budget.limited and not recipe.budget.progressive:
        method = recipe.budget.method if recipe.budget.method in methods else methods[0]
        text += f"\n\n{mix(scan, recipe.budget.model_copy(update={'method': method}))}"
    return Outcome(text, scan.to_dict(), after_sensitivity(scan, words))


def run_evaluate(args: argparse.Namespace) -> Outcome:
    """Compare a quantized checkpoint with its original."""
    result: Evaluation
    if args.text is not None:
        result = evaluate_language(
            args.model, args.reference, args.text, count=args.samples or 32, length=args.sequence_length
        )
    else:
        result = evaluate_policy(
            args.model,
            args.reference,
            args.episodes,
            count=args.samples,
            unnorm_key=args.unnorm_key,
            closed_loop=_closed_loop(args),
            control_hz=args.control_hz,
        )
        if args.videos is not None and result.rollouts is not None:
            folder = os.path.relpath(args.videos, args.json.parent)
            result = replace(result, rollouts=replace(result.rollouts, videos=folder))
    closing = after_evaluation(result, args.model, args.reference, args.episodes, _file(args))
    return Outcome(evaluation_table(result), to_dict(result), closing)


def _closed_loop(args: argparse.Namespace) -> ClosedLoop | None:
    """What ``--rollouts`` and the options that go with it mean; None without episodes."""
    if args.videos is not None and args.json is None:
        raise RecipeError("--videos goes with --json, which says which video is of which episode")
    if not args.rollouts:
        return None
    return ClosedLoop(
        args.rollouts,
        parse_simulator(args.env, args.env_option),
        max_steps=args.max_steps,
        workers=default_workers() if args.workers is None else args.workers,
        unnorm_key=args.unnorm_key,
        videos=args.videos,
    )


def _file(args: argparse.Namespace) -> Path | None:
    """Where ``--json`` writes; None if there is no file."""
    return None if args.json == STDOUT else args.json


def run_bench(args: argparse.Namespace) -> Outcome:
    """Measure kernels, or one action."""
    common = _given(args, "rounds", "threads")
    if any(value < 1 for value in common.values()):
        raise RecipeError("--rounds and --threads must be positive")
    common |= {"clock": args.clock, "device": args.device}
    of_shapes = _given(args, "tokens", "schemes", "dtype", "group_size")
    of_action = _given(args, "reference", "episodes", "unnorm_key", "dtypes", "model_dtypes")
    misplaced = of_action if args.shapes is not None else of_shapes
    if misplaced:
        option = "--" + next(iter(misplaced)).replace("_", "-")
        raise RecipeError(f"{option} goes with {'DIR' if args.shapes is not None else '--shapes'} only")
    if args.shapes is not None:
        result = bench_shapes(
            Settings(
                parse_shapes(args.shapes),
                of_shapes.get("tokens", (1, 8, 32, 50, 256)),
                parse_schemes(of_shapes.get("schemes", "w4a16,w8a8,w4a8"), of_shapes.get("group_size", 128)),
                dtype=getattr(torch, of_shapes.get("dtype", "float32")),
                **common,
            ),
            progress=lambda shapes: bar(shapes, "shapes"),
        )
        return Outcome(shapes_table(result), result, after_bench_shapes(result))
    dtypes: dict[str, Any] = {
        name: tuple(of_action.pop(name).split(",")) for name in ("dtypes", "model_dtypes") if name in of_action
    }
    result = bench_action(ActionSettings(args.model, **of_action, **dtypes, **common))
    closing = after_bench_action(result, args.model, args.reference, args.episodes, _file(args))
    return Outcome(action_table(result), result, closing)


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run_doctor(_: argparse.Namespace) -> Outcome:
    """Show what runs on this machine."""
    diagnosis = diagnose()
    return Outcome(doctor_report(diagnosis), diagnosis, after_doctor(diagnosis))


def run_report(args: argparse.Namespace) -> Outcome:
    """Write an HTML page."""
    outputs: list[Path] = args.compare or [args.model]
    for option in ("eval", "bench"):
        given = getattr(args, option)
        if given is not None and len(given) != len(outputs):
            raise RecipeError(f"--{option} names {len(given)} files for {len(outputs)} outputs; give one for each")
    inside = _given(args, "reference", "episodes", "unnorm_key", "measured")
    if args.compare is not None and inside:
        raise RecipeError(f"--{next(iter(inside)).replace('_', '-')} goes with one OUT only")
    if args.reference is None and args.episodes is not None:
        raise RecipeError("--episodes need --reference, the float directory")
    if args.reference is not None and args.measured is not None:
        raise RecipeError("--measured is what an earlier --reference found; give one of them")
    measured = None if args.measured is None else Measured.read(args.measured)
    if args.reference is not None:
        measured = measure(
            args.model,
            args.reference,
            args.episodes,
            unnorm_key=args.unnorm_key,
            progress=bar,
        )
    files = zip(outputs, args.eval or [None] * len(outputs), args.bench or [None] * len(outputs), strict=True)
    reports = [read_report(output, evaluation=e, benchmark=b, measured=measured) for output, e, b in files]
    page = render(reports[0]) if args.compare is None else render_comparison(reports)
    default = (
        Path("comparison.html") if args.compare is not None else outputs[0].with_name(f"{outputs[0].name}.report.html")
    )
    target = args.output or default
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    if args.compare is not None:
        document = {"kind": "comparison", "page": str(target), "models": [_in_short(one) for one in reports]}
        return Outcome(_short_table(reports), document, after_comparison(reports, target))
    found = (measured or Measured()).to_dict()
    closing = after_report(reports[0], target, args.model, args.reference, args.episodes)
    return Outcome(_short_table(reports), {"page": str(target), **_in_short(reports[0]), **found}, closing)


def _in_short(report: Report) -> dict[str, Any]:
    return {
        "name": report.name,
        "verdict": asdict(verdict(report)),
        "cards": [asdict(card) for card in cards(report)],
    }


def _short_table(reports: list[Report]) -> str:
    """What is at the top of a page: the verdict, and the five figures."""
    told = []
    for report in reports:
        rows = [("figure", "before", "after", "note")]
        rows += [(card.label, card.before, card.after, card.note) for card in cards(report)]
        told.append(f"{report.name}: {verdict(report).words}\n\n{format_table(rows)}")
    return "\n\n".join(told)


def run_inspect(args: argparse.Namespace) -> Outcome:
    """Show what a checkpoint holds."""
    read_config(args.directory)
    manifest = read_manifest(args.directory)
    made = plan_from_dict(manifest["plan"])
    text = f"{made.layer_table() if args.layers else made}\n\n{_summary(manifest)}"
    return Outcome(text, manifest, after_inspect(args.directory, made, manifest))


def _summary(manifest: dict[str, Any]) -> str:
    size = manifest["bytes_on_disk"]
    lines = [
        f"made with   {', '.join(f'{name} {version}' for name, version in manifest['versions'].items())}",
        f"quantizer   {'qat' if 'qat' in manifest else manifest['recipe']['quantizer']['kind']}",
        f"weights     {size['weights']:,} bytes on disk"
        + (f", from {size['source_weights']:,}" if size["source_weights"] else ""),
        f"verified    {manifest['verification']}",
    ]
    return "\n".join(lines)
