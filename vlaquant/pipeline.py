"""The story: open → plan → probe → predict → stage by stage → write and verify. No maths here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.checkpoint import check_output, read_config, read_manifest
from vlaquant.engine.opening import Run
from vlaquant.engine.processes import Processes
from vlaquant.engine.rotating import plan_for, untied_config
from vlaquant.engine.run import QuantizationRun, RunOptions
from vlaquant.engine.work import finished_run
from vlaquant.errors import PlanError
from vlaquant.export.writing import write, write_streamed
from vlaquant.families import family_of_config, family_of_model
from vlaquant.goals.asked import Asked
from vlaquant.goals.progressive import Curve
from vlaquant.goals.reaching import descend, reach
from vlaquant.plan import Plan
from vlaquant.recipe import Recipe, load_recipe, needs_calibration, require_calibration
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Scan

RecipeLike = Recipe | Mapping[str, Any] | str | Path


def plan(model_or_path: nn.Module | str | Path, recipe: RecipeLike) -> Plan:
    """What ``recipe`` would do to a model, without doing it; a directory's weights are not read.

    Raises:
        RecipeError, CheckpointError, PlanError: see :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    if isinstance(model_or_path, nn.Module):
        return plan_for(model_or_path, family_of_model(model_or_path, recipe.family), recipe)
    directory = Path(model_or_path)
    family = family_of_config(read_config(directory), recipe.family)
    return plan_for(family.build(directory), family, recipe)


def quantize(
    model_or_path: nn.Module | str | Path,
    recipe: RecipeLike,
    samples: Sequence[Any] | None = None,
    run: Run | None = None,
    output: str | Path | None = None,
    *,
    options: RunOptions | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
) -> QuantizationResult:
    """Quantize a model, and write and verify it if an output is given.

    A directory's model is then read, quantized and put away in a work directory one unit after the other (unless the
    names in its files are not those of the model, which the run says), and a run that was stopped can go on.

    Several processes of one machine that were started together (by torchrun or accelerate launch) share the work if all
    of them call this with the same arguments; the result is the same. Only the first of them writes.

    A recipe with a budget is first turned into one with a rule for each layer, by a scan of sensitivities. One with
    gates is quantized under another name, measured, and takes its own only if it passes.

    Args:
        model_or_path: a float checkpoint directory, or a loaded model, which is changed in place.
        recipe: a Recipe, a mapping, or the path of a YAML file.
        samples: calibration data, in place of what the recipe names.
        run: ``run(model, sample)`` takes one sample through any ``nn.Module``; known families run their own samples.
        output: directory to write; it appears only when it is complete and verified.
        options: memory limit and device, which do not change the result.
        overwrite: replace the output if it exists, and throw away an unfinished run.
        resume: go on with an unfinished run of the same recipe, model and samples.
        progress: show a progress bar and notes on standard error.

    Raises:
        VlaquantError: the recipe, the model, the data or the disk; nothing was written. See :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    model = model_or_path if isinstance(model_or_path, nn.Module) else Path(model_or_path)
    target = None if output is None else Path(output)
    options = options or RunOptions()

    def attempt(recipe: Recipe, output: Path | None) -> QuantizationResult:
        return _quantize(
            model, recipe, samples, run, output, options, overwrite=overwrite, resume=resume, progress=progress
        )

    if recipe.budget is None and recipe.require is None:
        return attempt(recipe, target)
    asked = Asked(model, recipe, target, samples, run, options, overwrite=overwrite, resume=resume, show=progress)
    return reach(asked, attempt)


def progressive(
    directory: str | Path, recipe: RecipeLike, *, options: RunOptions | None = None, progress: bool = False
) -> tuple[Scan, Curve]:
    """Lower the precision of a checkpoint until the tolerance of the recipe's budget is reached; nothing is written.

    Every mixture is quantized into a temporary directory and measured there.

    Raises:
        VlaquantError: as for :func:`quantize`, or the budget is no tolerance.
    """
    recipe = load_recipe(recipe)
    model, options = Path(directory), options or RunOptions()

    def attempt(recipe: Recipe, output: Path | None) -> QuantizationResult:
        return _quantize(model, recipe, None, None, output, options, overwrite=False, resume=False, progress=False)

    asked = Asked(model, recipe, None, None, None, options, overwrite=False, resume=False, show=progress)
    return descend(asked, attempt)


def _quantize(
    model_or_path: nn.Module | Path,
    recipe: Recipe,
    samples: Sequence[Any] | None,
    run: Run | None,
    target: Path | None,
    options: RunOptions,
    *,
    overwrite: bool,
    resume: bool,
    progress: bool,
) -> QuantizationResult:
    """One run of a recipe without goals."""
    if target is not None:
        if resume and not isinstance(model_or_path, nn.Module):
            done = finished_run(target, model_or_path, recipe.resolved(), samples)
            if done is not None:
                return QuantizationResult.from_manifest(target, recipe, done)
        check_output(target, overwrite=overwrite)
    if samples is None and needs_calibration(recipe):
        require_calibration(recipe)
    with (
        Processes.current(options.device) as processes,
        QuantizationRun(model_or_path, recipe, target, options, show=progress, processes=processes) as job,
    ):
        data, made = job.observe(job.plan(), samples, run)
        if not made.quantized and not made.replaced_tables:
            raise PlanError(f"no layer is left to quantize:\n{made}")
        loop = job.stages(made, data, overwrite=overwrite, resume=resume)
        loop.run()
        result = QuantizationResult(job.held(loop), recipe, made, tuple(loop.transforms), tuple(loop.layers))
        if target is None:
            return result
        manifest = _write(job, result, target, overwrite=overwrite) if processes.main else {}
        processes.barrier()
    return replace(result, output=target, manifest=manifest or read_manifest(target))


def _write(job: QuantizationRun, result: QuantizationResult, output: Path, *, overwrite: bool) -> dict[str, Any]:
    """The directory, from memory or from finished stages; returns its manifest."""
    opened = job.opened
    changed = {} if opened.untied is None or opened.directory is None else untied_config(opened.directory)
    if opened.files is None:
        return write(
            result.model,
            output,
            result.to_dict(),
            source=opened.directory,
            family=opened.family,
            inputs=job.inputs,
            changed=changed,
            overwrite=overwrite,
        )
    assert opened.directory is not None
    return write_streamed(
        output,
        result.to_dict() | {"source_sha256": job.source_sha256},
        source=opened.directory,
        files=opened.files,
        finished=job.finished(),
        family=opened.family,
        inputs=job.inputs,
        fits=job.fits(result.plan.bytes_after),
        changed=changed,
        overwrite=overwrite,
    )
