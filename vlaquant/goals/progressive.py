"""Progressive quantization: down the curve of the best mixtures, as long as a tolerance holds."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlaquant.errors import PlanError
from vlaquant.goals.asked import Asked, Attempt, resolved
from vlaquant.goals.gates import Figures, measure, missed
from vlaquant.recipe import Budget, Recipe, Require
from vlaquant.sensitivity import Mixture, Scan, mix
from vlaquant.terminal import format_table


@dataclass(frozen=True, slots=True)
class Step:
    """One mixture that was written and measured.

    Attributes:
        mixture: a candidate for each group.
        figures: of the written directory on held-out data.
        misses: tolerances that it exceeds.
    """

    mixture: Mixture
    figures: Figures
    misses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Size against what the action loses. ``str(curve)`` is a table.

    Attributes:
        steps: the most precise first; only the last may exceed a tolerance.
        names: of the figures that a tolerance is about.
    """

    steps: tuple[Step, ...]
    names: tuple[str, ...]

    @property
    def best(self) -> Mixture:
        """The smallest mixture within the tolerance.

        Raises:
            PlanError: not even the first is.
        """
        kept = [step.mixture for step in self.steps if not step.misses]
        if not kept:
            raise PlanError(
                f"budget: even the most precise mixture is beyond the tolerance: {'; '.join(self.steps[0].misses)}; "
                "add a better candidate, use another quantizer, or allow more"
            )
        return kept[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "kind": "progressive",
            "steps": [
                {
                    "bits": step.mixture.bits,
                    "bytes": step.mixture.bytes,
                    "cost": step.mixture.cost,
                    "choice": list(step.mixture.choice),
                    "misses": list(step.misses),
                    **{name: step.figures[name] for name in ("action_l1", *self.names)},
                }
                for step in self.steps
            ],
        }

    def __str__(self) -> str:
        names = tuple(dict.fromkeys(("action_l1", *self.names)))
        rows = [("bits a weight", "MiB", "cost", *names, "")]
        for step in self.steps:
            mixture = step.mixture
            figures = [f"{step.figures[name]:.4g}" for name in names]
            size = f"{mixture.bytes / 2**20:.2f}"
            rows.append(
                (f"{mixture.bits:.3f}", size, f"{mixture.cost:.3g}", *figures, "; ".join(step.misses) or "kept")
            )
        return format_table(rows)


def tolerance_of(recipe: Recipe, budget: Budget) -> Require | None:
    """A progressive budget's tolerances as gates; None for other budgets."""
    if not budget.progressive:
        return None
    data = {} if recipe.require is None else recipe.require.model_dump(include={"path", "samples", "rollouts"})
    return Require(action_l1=budget.max_action_l1, success_drop=budget.max_success_drop, **data)


def lower(asked: Asked, scan: Scan, budget: Budget, tolerance: Require, attempt: Attempt) -> Curve:
    """Write and measure the best mixture of every budget, from the most precise on, until one exceeds the tolerance.

    Args:
        asked: a directory to quantize.
        scan: its sensitivities.
        budget: progressive.
        tolerance: of that budget, as gates.
        attempt: quantizes into a temporary directory.
    """
    assert isinstance(asked.model, Path)
    steps: list[Step] = []
    for bits in _levels(scan, budget.steps):
        limits = {"bits": bits, "max_action_l1": None, "max_success_drop": None}
        mixture = mix(scan, budget.model_copy(update=limits))
        if steps and mixture.choice == steps[-1].mixture.choice:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            written = Path(scratch) / "step"
            attempt(resolved(asked, mixture), written)
            figures = measure(written, asked.model, asked.recipe, tolerance, show=asked.show)
        steps.append(Step(mixture, figures, tuple(missed(tolerance.gates, figures))))
        asked.say(f"{mixture}: {'; '.join(steps[-1].misses) or 'within the tolerance'}")
        if steps[-1].misses:
            break
    return Curve(tuple(steps), tuple(tolerance.gates))


def _levels(scan: Scan, steps: int) -> list[float]:
    """Bits a weight, from what the best candidates take down to what the smallest do."""
    total = sum(group.weights for group in scan.groups)
    most, least = (8 * sum(end(group.weight_bytes.values()) for group in scan.groups) / total for end in (max, min))
    return [float(bits) for bits in np.linspace(most, least, steps)]
