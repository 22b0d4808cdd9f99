"""What was asked for, and how its goals become a recipe without any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vlaquant.checkpoint import read_config
from vlaquant.engine.opening import Run
from vlaquant.engine.run import RunOptions
from vlaquant.families import Family, family_of_config, family_of_model
from vlaquant.recipe import Recipe
from vlaquant.result import QuantizationResult
from vlaquant.sensitivity import Mixture, with_rules
from vlaquant.terminal import say

#: Quantizes by a recipe without goals, into a directory if there is one.
Attempt = Callable[[Recipe, Path | None], QuantizationResult]


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What :func:`vlaquant.quantize` was asked for.

    Attributes:
        model: a loaded model, or a directory.
        recipe: with goals.
        output: directory to write, if any.
        samples: calibration data, in place of what the recipe names.
        run: takes a sample through the model, if the caller does that.
        options: of the run.
        overwrite: replace the output.
        resume: go on with an unfinished run.
        show: notes on standard error.
    """

    model: nn.Module | Path
    recipe: Recipe
    output: Path | None
    samples: Sequence[Any] | None
    run: Run | None
    options: RunOptions
    overwrite: bool
    resume: bool
    show: bool

    def say(self, text: str) -> None:
        """A line for whoever watches."""
        if self.show:
            say(text)


def resolved(asked: Asked, mixture: Mixture) -> Recipe:
    """The recipe with the mixture as rules, and without the budget."""
    model, family = _skeleton(asked)
    return with_rules(asked.recipe, mixture, model, family)


def _skeleton(asked: Asked) -> tuple[nn.Module, Family]:
    if isinstance(asked.model, nn.Module):
        return asked.model, family_of_model(asked.model, asked.recipe.family)
    family = family_of_config(read_config(asked.model), asked.recipe.family)
    return family.build(asked.model), family
