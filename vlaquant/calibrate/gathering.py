"""From samples to statistics of every layer that the plan quantizes with data."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.calibrate.observation import observe
from vlaquant.calibrate.probing import probe
from vlaquant.calibrate.statistics import ActStats
from vlaquant.errors import CalibrationError
from vlaquant.families import Family
from vlaquant.families.causal_lm import text_samples
from vlaquant.plan import Plan, with_dead, without
from vlaquant.recipe import Recipe, Text

_MIN_TOKENS = 32

#: Takes one sample through the model.
Run = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, slots=True, eq=False)
class Gathered:
    """What calibration found.

    Attributes:
        plan: as it can be carried out.
        stats: by layer.
        shared: sets of layers that read the very same tensors.
    """

    plan: Plan
    stats: dict[str, ActStats]
    shared: tuple[tuple[str, ...], ...]


def recipe_samples(recipe: Recipe, family: Family, model_directory: Path | None) -> Sequence[Any]:
    """The samples that a recipe's ``calibration`` section names.

    Raises:
        CalibrationError: none there, or of a kind that this family cannot run.
    """
    section = recipe.calibration
    assert section is not None
    if isinstance(section, Text):
        if family.name != "causal_lm" or model_directory is None:
            raise CalibrationError(
                f"calibration of kind text is for language models in a directory, not for {family.name}"
            )
        return text_samples(model_directory, section.path, section.samples, section.sequence_length)
    if family.episode_samples is None:
        raise CalibrationError(f"calibration of kind episodes is for policies, and family {family.name} is none")
    return family.episode_samples(section.path, section.split, section.samples, section.unnorm_key)


def gather(
    model: nn.Module,
    plan: Plan,
    run: Run,
    samples: Sequence[Any],
    *,
    recipe: Recipe,
    progress: Callable[[Sequence[Any]], Iterable[Any]],
) -> Gathered:
    """Probe the model with the first sample, then collect statistics over all.

    Returns:
        The plan with layers that never ran, or whose weight is used elsewhere, taken out; and what was seen.

    Raises:
        CalibrationError: no samples, NaN activations, or a layer that saw fewer than the recipe's ``min_tokens``.
    """
    if not samples:
        raise CalibrationError("the calibration data is empty; give at least one sample")
    with torch.inference_mode():
        probed = probe(model, lambda: run(model, samples[0]))
        reason = "its weight is also used outside of the layer, which a packed layer does not allow"
        plan = without(with_dead(plan, probed.never_ran), dict.fromkeys(probed.functional, reason))
        names = [layer.name for layer in plan.quantized.values() if not layer.dead]
        with observe(model, names, hessian_for=names, seed=recipe.seed) as observation:
            for sample in progress(samples):
                observation.begin_sample()
                run(model, sample)
    observation.check(_MIN_TOKENS if recipe.calibration is None else recipe.calibration.min_tokens)
    return Gathered(plan, observation.stats(), probed.shared)
