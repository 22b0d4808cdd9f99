"""The story: load → plan → gather → transform → quantize → swap → write and verify. No maths here."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from vlaquant.calibrate.gathering import Gathered, Run, gather, recipe_samples
from vlaquant.checkpoint import check_output, check_source, read_config
from vlaquant.errors import PlanError
from vlaquant.export import write
from vlaquant.families import Family, family_of_config, family_of_model
from vlaquant.passes.model import begin, check_finite, quantize_layers_, transform_
from vlaquant.plan import Plan, make_plan
from vlaquant.recipe import Recipe, load_recipe, needs_calibration, require_calibration
from vlaquant.result import QuantizationResult

RecipeLike = Recipe | Mapping[str, Any] | str | Path


def plan(model_or_path: nn.Module | str | Path, recipe: RecipeLike) -> Plan:
    """What ``recipe`` would do to a model, without doing it; a directory's weights are not read.

    Raises:
        RecipeError, CheckpointError, PlanError: see :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    if isinstance(model_or_path, nn.Module):
        return make_plan(model_or_path, family_of_model(model_or_path, recipe.family), recipe)
    directory = Path(model_or_path)
    family = family_of_config(read_config(directory), recipe.family)
    return make_plan(family.build(directory), family, recipe)


def quantize(
    model_or_path: nn.Module | str | Path,
    recipe: RecipeLike,
    samples: Sequence[Any] | None = None,
    run: Run | None = None,
    output: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> QuantizationResult:
    """Quantize a model, and write and verify it if an output is given.

    Args:
        model_or_path: a float checkpoint directory, or a loaded model, which is changed in place.
        recipe: a Recipe, a mapping, or the path of a YAML file.
        samples: calibration data, in place of what the recipe names.
        run: ``run(model, sample)`` takes one sample through any ``nn.Module``; known families run their own samples.
        output: directory to write; it appears only when it is complete and verified.
        overwrite: replace the output if it exists.
        progress: show progress bars.

    Raises:
        VlaquantError: the recipe, the model, the data or the disk; nothing was written. See :mod:`vlaquant.errors`.
    """
    recipe = load_recipe(recipe)
    if output is not None:
        check_output(Path(output), overwrite=overwrite)
    if samples is None and needs_calibration(recipe):
        require_calibration(recipe)
    model, family, source = _open(model_or_path, recipe)
    made = make_plan(model, family, recipe)
    if samples is None and recipe.calibration is not None:
        samples = recipe_samples(recipe, family, source)
    inputs = family.inputs(model, samples[0]) if samples and run is None else None
    gathered = Gathered(made, {}, ())
    if samples is not None:
        if inputs is not None:
            family.check(model, inputs)
        run = run or (lambda model, sample: family.run(model, family.inputs(model, sample)))
        gathered = gather(model, made, run, samples, recipe=recipe, progress=_bar("observing", show=progress))
    made = gathered.plan
    if not made.quantized:
        raise PlanError(f"no layer is left to quantize:\n{made}")
    works = begin(model, gathered)
    show = _bar("transforming", show=progress)
    transforms = transform_(model, family, works, recipe, inputs, shared=gathered.shared, progress=show)
    layers = quantize_layers_(model, works, recipe.quantizer, progress=_bar("quantizing", show=progress))
    result = QuantizationResult(model, recipe, made, tuple(transforms), tuple(layers))
    if output is None:
        return result
    manifest = write(
        model, Path(output), result.to_dict(), source=source, family=family, inputs=inputs, overwrite=overwrite
    )
    return replace(result, output=Path(output), manifest=manifest)


def _open(model_or_path: nn.Module | str | Path, recipe: Recipe) -> tuple[nn.Module, Family, Path | None]:
    """The model, its family, and the directory it came from."""
    if isinstance(model_or_path, nn.Module):
        check_finite(model_or_path)
        return model_or_path, family_of_model(model_or_path, recipe.family), None
    directory = Path(model_or_path)
    family = family_of_config(check_source(directory), recipe.family)
    return family.load(directory), family, directory


def _bar(label: str, *, show: bool) -> Callable[[Sequence[Any]], Iterable[Any]]:
    return lambda items: tqdm(items, desc=label, disable=None if show else True, leave=False)
