"""Gates: figures of a written model on held-out data, against what the recipe requires."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vlaquant.checkpoint import read_config
from vlaquant.engine.opening import Opened, recipe_samples
from vlaquant.errors import RecipeError
from vlaquant.evaluate.actions import compare
from vlaquant.evaluate.language import compare_text
from vlaquant.evaluate.metaworld import why_not
from vlaquant.evaluate.results import plain
from vlaquant.evaluate.rollouts import ClosedLoop, default_workers, roll_out
from vlaquant.evaluate.sight import image_sensitivity
from vlaquant.export import load
from vlaquant.families import Family, family_of_config
from vlaquant.recipe import Episodes, Recipe, Require
from vlaquant.terminal import bar

#: Figures by the names of gates, and under ``details`` what they came from.
Figures = dict[str, Any]

_OF_POLICIES = ("action_l1", "bin_distance", "gripper_flips", "image_sensitivity", "success_drop")


def require_measurable(require: Require, recipe: Recipe, source: Path) -> None:
    """Refuse gates that cannot be measured, before hours are spent.

    Raises:
        RecipeError: a gate that this kind of model has not, no held-out data, or no simulator.
        CheckpointError: no checkpoint there.
    """
    config = read_config(source)
    family = family_of_config(config, recipe.family)
    wrong = [name for name in require.gates if (name in _OF_POLICIES) == (family.act is None)]
    if wrong:
        kind = "takes no actions" if family.act is None else "is a policy, whose words do not matter"
        raise RecipeError(
            f"require: {', '.join(wrong)} cannot be measured on a model of family {family.name}: it {kind}"
        )
    decoding = getattr(getattr(family.build(source), "config", None), "action_decoding", "regression")
    if require.bin_distance is not None and decoding == "regression":
        raise RecipeError("require: bin_distance is about action tokens, and this policy has none; use action_l1")
    obstacle = why_not() if require.success_drop is not None else None
    if obstacle is not None:
        raise RecipeError(f"require: success_drop cannot be measured here: {obstacle}")
    held_out(require, recipe, source, family)


def held_out(require: Require, recipe: Recipe, source: Path, family: Family) -> Sequence[Any]:
    """The held-out samples that gates are measured on.

    Raises:
        RecipeError: they would be those that the model is calibrated on.
        CalibrationError: there are none.
    """
    section = recipe.calibration
    if section is None:
        raise RecipeError("require: the kind of held-out data is that of `calibration:`, which the recipe has not")
    path = require.path or section.path
    changes: dict[str, Any] = {"path": path, "samples": require.samples}
    if isinstance(section, Episodes):
        changes["split"] = "evaluation"
    if path == section.path and changes.get("split") == getattr(section, "split", None):
        raise RecipeError(
            f"require: {path} is what the model is calibrated on, so it proves nothing; give other data with `path:`"
        )
    asked = recipe.model_copy(update={"calibration": section.model_copy(update=changes)})
    return recipe_samples(asked, Opened(family.build(source), family, source, None, ""))


def measure(candidate: Path, reference: Path, recipe: Recipe, require: Require, *, show: bool) -> Figures:
    """The figures that the gates of ``require`` are about, of a written directory against its float source.

    Args:
        candidate: a quantized directory.
        reference: the float one.
        recipe: says of what kind the data is.
        require: gates and held-out data.
        show: show progress bars.

    Raises:
        EvaluationError: what cannot be compared.
    """

    def watched(label: str) -> Callable[[Sequence[Any]], Sequence[Any]]:
        return lambda items: bar(items, label, show=show)  # type: ignore[return-value]

    family = family_of_config(read_config(reference), recipe.family)
    samples = held_out(require, recipe, reference, family)
    quantized, original = load(candidate), load(reference)
    figures: Figures = {"samples": len(samples)}
    if family.act is None:
        texts = [sample for sample in samples if isinstance(sample, Tensor)]
        words, _ = compare_text(quantized, original, texts, watched("comparing text"))
        figures |= {"perplexity_ratio": words.perplexity.ratio.value, "language": plain(words)}
        return figures
    actions = compare(quantized, original, samples, watched("comparing actions")).figures
    figures |= {"action_l1": actions.whole_chunk.l1.value, "gripper_flips": actions.gripper_flips.value}
    if actions.bin_distance is not None:
        figures["bin_distance"] = actions.bin_distance.value
    figures["actions"] = plain(actions)
    if require.image_sensitivity is not None:
        sight = image_sensitivity(quantized, original, samples, watched("turning images black"))
        figures |= {"image_sensitivity": sight.ratio.value, "sight": plain(sight)}
    if require.success_drop is not None:
        loop = ClosedLoop(require.rollouts, workers=default_workers())
        driven = roll_out(candidate, reference, loop, lambda _: None)
        figures |= {"success_drop": -driven.success.difference.value, "rollouts": plain(driven)}
    return figures


def missed(gates: Mapping[str, float], figures: Figures) -> list[str]:
    """One line for each gate that the figures miss. What is NaN misses every gate."""
    lines = []
    for name, limit in gates.items():
        value = float(figures[name])
        if name == "image_sensitivity":
            if not limit <= value <= 1.0 / limit:
                lines.append(f"{name} is {value:.3g} of the float policy's, wanted {limit:g} to {1.0 / limit:g}")
        elif not value <= limit:
            lines.append(f"{name} is {value:.4g}, at most {limit:g} is allowed")
    return lines
