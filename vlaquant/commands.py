"""What each subcommand of ``vlaquant`` does: it calls one function and prints."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vlaquant.benchmark.action import ActionSettings, bench_action
from vlaquant.benchmark.doctor import diagnose
from vlaquant.benchmark.doctor import report as doctor_report
from vlaquant.benchmark.shapes import Settings, bench_shapes, parse_schemes, parse_shapes
from vlaquant.benchmark.tables import action_table, shapes_table
from vlaquant.checkpoint import read_config, read_manifest
from vlaquant.engine.processes import launched
from vlaquant.engine.run import RunOptions
from vlaquant.errors import RecipeError
from vlaquant.evaluate.evaluation import evaluate_language, evaluate_policy
from vlaquant.evaluate.results import Evaluation, to_dict
from vlaquant.evaluate.rollouts import ClosedLoop, default_workers
from vlaquant.evaluate.simulators import parse_simulator
from vlaquant.evaluate.table import table as evaluation_table
from vlaquant.goals.plotting import plot_curve, plot_scan
from vlaquant.pipeline import plan, progressive, quantize
from vlaquant.plan import plan_from_dict
from vlaquant.recipe import Budget, load_recipe
from vlaquant.report import Measured, measure, read_report, render, render_comparison
from vlaquant.sensitivity import Method, mix, sensitivity
from vlaquant.training import Training, finetune


def _model_directory(args: argparse.Namespace, recipe_model: Path | None) -> Path:
    model: Path | None = args.model or recipe_model
    if model is None:
        raise RecipeError(f"{args.config}: names no model; add `model:` to it or give --model DIR")
    return model


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize, or print the plan."""
    recipe = load_recipe(args.config)
    model = _model_directory(args, recipe.model)
    rank, _ = launched()
    if args.dry_run:
        if rank == 0:
            print(plan(model, recipe))
        return
    output = args.output or recipe.output
    if output is None:
        raise RecipeError(f"{args.config}: names no output; add `output:` to it or give --output DIR")
    options = RunOptions(max_memory=args.max_memory, mode=args.mode, device=args.device, log=args.log)
    result = quantize(
        model, recipe, output=output, options=options, overwrite=args.overwrite, resume=args.resume, progress=True
    )
    if rank == 0:
        print(result)


def run_qat(args: argparse.Namespace) -> None:
    """Fine-tune with rounded weights."""
    recipe = load_recipe(args.config)
    training = Training(args.steps, args.learning_rate, args.batch, args.follow)
    model = _model_directory(args, recipe.model)
    print(finetune(model, recipe, training, output=args.output, overwrite=args.overwrite, progress=True))


def run_plan(args: argparse.Namespace) -> None:
    """Print what a recipe would do."""
    recipe = load_recipe(args.config)
    made = plan(_model_directory(args, recipe.model), recipe)
    print(made.layer_table() if args.layers else made)


def run_sensitivity(args: argparse.Namespace) -> None:
    """Print what each scheme does to each layer."""
    recipe = load_recipe(args.config)
    model = _model_directory(args, recipe.model)
    if args.samples is not None:
        if args.samples < 1:
            raise RecipeError("--samples must be positive")
        budget = (recipe.budget or Budget()).model_copy(update={"samples": args.samples})
        recipe = recipe.model_copy(update={"budget": budget})
    options = RunOptions(device=args.device)
    if args.progressive:
        scan, curve = progressive(model, recipe, options=options, progress=True)
        _write_json(args.json, scan.to_dict() | {"progressive": curve.to_dict()})
        if args.plot is not None:
            plot_curve(curve, args.plot)
        print(curve)
        print(f"\n{curve.best}")
        return
    every: tuple[Method, ...] = ("estimated", "measured")
    methods = [one for one in every if getattr(args, one)] or every
    scan = sensitivity(model, recipe, methods=methods, options=options, progress=True)
    _write_json(args.json, scan.to_dict())
    if args.plot is not None:
        plot_scan(scan, args.plot)
    print(scan)
    if recipe.budget is not None and recipe.budget.limited and not recipe.budget.progressive:
        method = recipe.budget.method if recipe.budget.method in methods else methods[0]
        print(f"\n{mix(scan, recipe.budget.model_copy(update={'method': method}))}")


def run_evaluate(args: argparse.Namespace) -> None:
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
    _write_json(args.json, to_dict(result))
    print(evaluation_table(result))


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


def _write_json(path: Path | None, result: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run_bench(args: argparse.Namespace) -> None:
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
            progress=lambda shapes: tqdm(shapes, "shapes", disable=None, leave=False),
        )
    else:
        dtypes: dict[str, Any] = {
            name: tuple(of_action.pop(name).split(",")) for name in ("dtypes", "model_dtypes") if name in of_action
        }
        result = bench_action(ActionSettings(args.model, **of_action, **dtypes, **common))
    _write_json(args.json, result)
    print(shapes_table(result) if args.shapes is not None else action_table(result))


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The options of these names that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def run_doctor(args: argparse.Namespace) -> None:
    """Print what runs on this machine."""
    diagnosis = diagnose()
    print(json.dumps(diagnosis, indent=2) if args.json else doctor_report(diagnosis))


def run_report(args: argparse.Namespace) -> None:
    """Write an HTML page."""
    outputs: list[Path] = args.compare or [args.model]
    for option in ("eval", "bench"):
        given = getattr(args, option)
        if given is not None and len(given) != len(outputs):
            raise RecipeError(f"--{option} names {len(given)} files for {len(outputs)} outputs; give one for each")
    inside = _given(args, "reference", "episodes", "unnorm_key", "json", "measured")
    if args.compare is not None and inside:
        raise RecipeError(f"--{next(iter(inside)).replace('_', '-')} goes with one OUT only")
    if args.reference is None and (args.episodes is not None or args.json is not None):
        raise RecipeError("--episodes and --json need --reference, the float directory")
    if args.reference is not None and args.measured is not None:
        raise RecipeError("--measured is what an earlier --reference found; give one of them")
    measured = None if args.measured is None else Measured.read(args.measured)
    if args.reference is not None:
        measured = measure(
            args.model,
            args.reference,
            args.episodes,
            unnorm_key=args.unnorm_key,
            progress=lambda items, label: tqdm(items, label, disable=None, leave=False),  # type: ignore[arg-type,return-value]
        )
        if args.json is not None:
            measured.write(args.json)
    files = zip(outputs, args.eval or [None] * len(outputs), args.bench or [None] * len(outputs), strict=True)
    reports = [read_report(output, evaluation=e, benchmark=b, measured=measured) for output, e, b in files]
    page = render(reports[0]) if args.compare is None else render_comparison(reports)
    default = (
        Path("comparison.html") if args.compare is not None else outputs[0].with_name(f"{outputs[0].name}.report.html")
    )
    target = args.output or default
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(page, encoding="utf-8")
    print(f"written: {target} ({target.stat().st_size / 1e6:.2f} MB); open it in a browser, it needs no network")


def run_inspect(args: argparse.Namespace) -> None:
    """Print what a checkpoint holds."""
    read_config(args.directory)
    manifest = read_manifest(args.directory)
    made = plan_from_dict(manifest["plan"])
    print(made.layer_table() if args.layers else made)
    print()
    print(_summary(manifest))


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
