"""From goals to a result: budget → rules → run → gates → accepted, set aside, or another run with more precision.

A run under gates writes ``OUT.unchecked``. Only when it has passed does that become ``OUT``; what failed becomes
``OUT.rejected``, which can be loaded and looked at, but never under the name that was asked for.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.checkpoint import (
    MANIFEST,
    check_output,
    read_manifest,
    replace_directory,
    sha256,
    weight_files,
)
from vlaquant.engine.processes import launched
from vlaquant.engine.run import log_path
from vlaquant.errors import CheckpointError, GateError, RecipeError
from vlaquant.goals.asked import Asked, Attempt, resolved
from vlaquant.goals.gates import measure, missed, require_measurable
from vlaquant.goals.progressive import Curve, lower, tolerance_of
from vlaquant.recipe import Budget, Recipe
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Mixture, Scan, mix, sensitivity, write_scan
from vlaquant.sensitivity.scan import recorded

#: What a scan depends on, of a recipe and of its budget.
_SAME = ("family", "rules", "on_indivisible", "quantizer", "token_weights")
_SAME_BUDGET = ("candidates", "group_size", "layers")


def reach(asked: Asked, attempt: Attempt) -> QuantizationResult:
    """Do what a recipe with a budget, or with gates, asks for.

    Raises:
        RecipeError: goals that cannot be measured here.
        PlanError: no mixture meets the budget.
        GateError: the result misses a gate; it lies in ``OUT.rejected``.
    """
    recipe, budget = asked.recipe, asked.recipe.budget
    _require_possible(asked)
    mixture = None
    if budget is not None:
        if budget.progressive:
            _, curve = descend(asked, attempt)
            asked.say(str(curve))
            mixture = curve.best
        else:
            mixture = mix(find_scan(asked, budget), budget)
        asked.say(f"mixed precision: {mixture}")
        recipe = resolved(asked, mixture)
    if recipe.require is None:
        return attempt(recipe, asked.output)
    return _through_gates(asked, recipe, mixture, attempt)


def descend(asked: Asked, attempt: Attempt) -> tuple[Scan, Curve]:
    """The scan, and the curve of a budget that is a tolerance.

    Raises:
        RecipeError: it is none, or cannot be measured here.
    """
    recipe, budget = asked.recipe, asked.recipe.budget
    tolerance = None if budget is None else tolerance_of(recipe, budget)
    if budget is None or tolerance is None:
        raise RecipeError("budget: has no tolerance to lower the precision to; add max_action_l1 or max_success_drop")
    if isinstance(asked.model, nn.Module):
        raise RecipeError("budget: a tolerance is measured on written directories; quantize a directory")
    require_measurable(tolerance, recipe, asked.model)
    scan = find_scan(asked, budget)
    return scan, lower(asked, scan, budget, tolerance, attempt)


def _require_possible(asked: Asked) -> None:
    recipe = asked.recipe
    _, size = launched()
    if size > 1 and (recipe.require is not None or (recipe.budget is not None and recipe.budget.scan is None)):
        raise RecipeError(
            "gates and scans run in one process: make the scan first (vlaquant sensitivity --json FILE, then "
            "'budget: {scan: FILE}'), and check gates with vlaquant eval"
        )
    if asked.output is not None:
        check_output(asked.output, overwrite=asked.overwrite)
    if recipe.require is None:
        return
    if asked.output is None or isinstance(asked.model, nn.Module):
        raise RecipeError(
            "require: gates compare a written directory with its source; quantize a directory, and give an output"
        )
    require_measurable(recipe.require, recipe, asked.model)


def find_scan(asked: Asked, budget: Budget) -> Scan:
    """The budget's scan, one that an earlier run left beside the output, or a new one.

    Raises:
        RecipeError: the scan is of other rules or candidates.
    """
    beside = None if asked.output is None else asked.output.parent / f"{asked.output.name}.sensitivity.json"
    if budget.scan is not None:
        scan = Scan.read(budget.scan)
        different = _difference(scan, asked.recipe)
        if different is not None:
            raise RecipeError(f"{budget.scan}: was made with other {different}; make it again (vlaquant sensitivity)")
        return scan
    if asked.resume and beside is not None and beside.is_file():
        scan = Scan.read(beside)
        if scan.recipe == json.loads(json.dumps(recorded(asked.recipe))):
            asked.say(f"the scan of the earlier run is taken: {beside}")
            return scan
    scan = sensitivity(
        asked.model,
        asked.recipe,
        asked.samples,
        asked.run,
        methods=(budget.method,),
        options=asked.options,
        progress=asked.show,
    )
    if beside is not None:
        write_scan(beside, scan.to_dict())
    return scan


def _difference(scan: Scan, recipe: Recipe) -> str | None:
    """What a scan was made with that the recipe has not; None if it fits."""
    mine, theirs = json.loads(json.dumps(recorded(recipe))), scan.recipe
    for name in _SAME:
        if mine[name] != theirs[name]:
            return name
    default = Budget().model_dump(mode="json")
    first, second = (one["budget"] or default for one in (mine, theirs))
    return next((f"budget.{name}" for name in _SAME_BUDGET if first[name] != second[name]), None)


def _through_gates(asked: Asked, recipe: Recipe, mixture: Mixture | None, attempt: Attempt) -> QuantizationResult:
    assert asked.output is not None
    assert not isinstance(asked.model, nn.Module)
    assert recipe.require is not None
    require, rounds = recipe.require, list[dict[str, Any]]()
    unchecked = asked.output.with_name(f"{asked.output.name}.unchecked")
    while True:
        result = _finished(asked, recipe, unchecked) or attempt(recipe, unchecked)
        figures = measure(unchecked, asked.model, recipe, require, show=asked.show)
        misses = missed(require.gates, figures)
        rounds.append(
            {"mixture": None if mixture is None else str(mixture), "missed": misses}
            | {name: figures[name] for name in require.gates}
        )
        measured = figures | {"require": require.gates, "passed": not misses, "rounds": rounds}
        manifest = _note(unchecked, measured)
        asked.say(f"gates, round {len(rounds)}: {'; '.join(misses) or 'passed'}")
        if not misses:
            _take_name(unchecked, asked.output)
            return replace(result, output=asked.output, manifest=manifest)
        lifted = mixture.raised() if mixture is not None and asked.recipe.on_miss == "raise_precision" else None
        if lifted is None:
            raise _rejected(asked.output, unchecked, misses, asked.recipe)
        mixture = lifted
        asked.say(f"more precision: {mixture}")
        shutil.rmtree(unchecked)
        recipe = resolved(asked, mixture)


def _finished(asked: Asked, recipe: Recipe, unchecked: Path) -> QuantizationResult | None:
    """What an earlier run wrote before it was stopped at the gates; anything else of that name is deleted.

    Raises:
        ExportError: something is there, and neither --resume nor --overwrite was given.
    """
    if not unchecked.is_dir():
        return None
    check_output(unchecked, overwrite=asked.overwrite or asked.resume)
    assert isinstance(asked.model, Path)
    try:
        manifest = read_manifest(unchecked) if asked.resume else {}
    except CheckpointError:
        manifest = {}
    sums = manifest.get("source_sha256", {})
    if manifest.get("recipe") == json.loads(json.dumps(recipe.resolved())) and all(
        sums.get(path.name) == sha256(path) for path in weight_files(asked.model)
    ):
        return QuantizationResult.from_manifest(unchecked, recipe, manifest)
    shutil.rmtree(unchecked)
    return None


def _note(directory: Path, measured: dict[str, Any]) -> dict[str, Any]:
    """Put what was measured into a manifest; returns it."""
    manifest = read_manifest(directory) | {"measured": measured}
    new = directory / f"{MANIFEST}.new"
    new.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(new, directory / MANIFEST)
    return manifest


def _take_name(unchecked: Path, name: Path) -> None:
    """Rename a directory and its log, in place of what has that name."""
    replace_directory(name, unchecked)
    if log_path(unchecked).is_file():
        log_path(unchecked).replace(log_path(name))


def _rejected(output: Path, unchecked: Path, misses: Sequence[str], recipe: Recipe) -> GateError:
    aside = output.with_name(f"{output.name}.rejected")
    _take_name(unchecked, aside)
    advice = (
        "every layer has its best candidate: add a better one to the budget"
        if recipe.on_miss == "raise_precision"
        else "give more bits, another quantizer or more calibration data, or let 'on_miss: raise_precision' do it"
    )
    return GateError(
        f"{output}: was not accepted, and lies in {aside}: {'; '.join(misses)}. What to do: {advice}; or ask for less"
    )
