"""The model of a run: in memory, or empty with its weights on demand; and its calibration data, proved by a probe."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlaquant.calibrate.units import Stage
from vlaquant.checkpoint import TensorFiles, check_source, weight_files
from vlaquant.engine.weights import WeightsOnDemand, names_differ
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import Family, family_of_config, family_of_model
from vlaquant.families.data import load_jsonl, load_lerobot, load_observations
from vlaquant.families.hf_samples import text_samples
from vlaquant.recipe import JsonLines, LeRobot, Recipe, Text

#: Takes one sample through the model.
Run = Callable[[nn.Module, Any], object]


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A model to quantize.

    Attributes:
        model: in memory, or on the meta device if there are ``files``.
        directory: where it came from; None if it came from memory.
        files: its weights, if they come on demand.
        note: how it is held and why, for whoever watches.
        untied: the head that a rotation gave a weight of its own.
    """

    model: nn.Module
    family: Family
    directory: Path | None
    files: TensorFiles | None
    note: str
    untied: str | None = None


def open_model(model_or_path: nn.Module | str | Path, recipe: Recipe, *, stream: bool) -> Opened:
    """The model and its family.

    Args:
        model_or_path: a float checkpoint directory, or a loaded model.
        recipe: may name the family.
        stream: hold a directory's model in parts, if its files allow that.

    Raises:
        CheckpointError: what :func:`vlaquant.checkpoint.check_source` raises, or NaN or Inf in a loaded model.
    """
    if isinstance(model_or_path, nn.Module):
        _require_finite(model_or_path)
        return Opened(
            model_or_path, family_of_model(model_or_path, recipe.family), None, None, "the model is in memory"
        )
    directory = Path(model_or_path)
    config = check_source(directory, values=False)
    family = family_of_config(config, recipe.family)
    if stream:
        files = TensorFiles.open(weight_files(directory))
        model = family.build(directory)
        if family.live_names is not None:
            files.rename_(family.live_names(model, files.names()))
        files.add_(family.converted(directory).tensors(), directory)
        trouble = names_differ(model, files)
        if trouble is None:
            return Opened(model, family, directory, files, "weights are read when their turn comes")
        files.close()
        note = f"the whole model is held in memory, because {trouble}"
    else:
        note = "the whole model is held in memory, because no output is written"
    check_source(directory)
    return Opened(family.load(directory), family, directory, None, note)


def _require_finite(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{name} holds values that are NaN or infinite")


def bring_weights(
    opened: Opened, stages: Sequence[Stage], device: torch.device, *, keep: bool
) -> WeightsOnDemand | None:
    """Weights on demand; None if the model holds its weights. ``keep`` leaves room for two of the largest units."""
    if opened.files is None:
        return None
    tensors = opened.model.state_dict(keep_vars=True)
    sizes = [sum(t.nbytes for name, t in tensors.items() if name.startswith(f"{stage.unit}.")) for stage in stages]
    budget = 2 * max(sizes, default=0) if keep else 0
    return WeightsOnDemand(opened.model, stages, opened.files, budget=budget, device=device)


def recipe_samples(recipe: Recipe, opened: Opened) -> Sequence[Any]:
    """The samples that a recipe's ``calibration`` section names.

    Raises:
        CalibrationError: none there, or text for a family that reads none.
    """
    section, family = recipe.calibration, opened.family
    assert section is not None
    if isinstance(section, Text):
        if family.name != "hf" or opened.directory is None:
            raise CalibrationError(
                f"calibration of kind text is for language models in a directory, not for {family.name}"
            )
        return text_samples(opened.directory, section.path, section.samples, section.sequence_length)
    match section:
        case JsonLines():
            return load_jsonl(section.path, section.samples, seed=recipe.seed, unnorm_key=section.unnorm_key)
        case LeRobot():
            return load_lerobot(
                section.path,
                section.samples,
                seed=recipe.seed,
                cameras=section.cameras,
                state=section.state,
                action=section.action,
                chunk=section.chunk,
                unnorm_key=section.unnorm_key,
            )
    return load_observations(
        section.path,
        section.split,
        section.samples,
        section.unnorm_key,
        cameras=section.cameras,
        state=section.state,
        action=section.action,
    )
