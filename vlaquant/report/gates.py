"""The verdict: what the recipe's ``require:`` asks for, against what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlaquant.report.evaluated import Evaluation
from vlaquant.report.reading import figure, mapping

#: Gate of a recipe -> what it is about. All but ``image_sensitivity``, which has a band, are upper limits.
GATES = {
    "action_l1": "mean absolute difference of actions",
    "bin_distance": "mean distance of action tokens, in bins",
    "gripper_flips": "share of gripper commands that change sign",
    "image_sensitivity": "how much the image matters, as a share of the float policy's",
    "success_drop": "loss of success rate in simulated episodes",
    "perplexity_ratio": "perplexity over that of the float model",
}


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate; ``value`` and ``passed`` are None if it was not measured."""

    name: str
    about: str
    limit: float
    value: float | None
    passed: bool | None


def read_gates(manifest: Mapping[str, Any], evaluation: Evaluation | None) -> tuple[Gate, ...]:
    """The gates of a recipe, judged by an evaluation of what the file holds now, or else by what the run measured."""
    measured = mapping(manifest, "measured")
    limits = mapping(measured, "require") or mapping(manifest, "recipe", "require")
    gates = []
    for name, about in GATES.items():
        limit = figure(limits, name)
        if limit is None:
            continue
        value = None if evaluation is None else _figures(evaluation).get(name)
        if value is None:
            value = figure(measured, name)
        gates.append(Gate(name, about, limit, value, None if value is None else _passes(name, limit, value)))
    return tuple(gates)


def _passes(name: str, limit: float, value: float) -> bool:
    return limit <= value <= 1.0 / limit if name == "image_sensitivity" else value <= limit


def _figures(evaluation: Evaluation) -> dict[str, float | None]:
    """The figures that gates are about. What is NaN stays NaN, and passes no gate."""
    policy, perplexity = evaluation.policy, evaluation.perplexity
    sight = None if policy is None else policy.inside.image_sensitivity
    return {
        "action_l1": evaluation.mean_l1,
        "bin_distance": evaluation.bin_distance,
        "gripper_flips": None if policy is None else policy.actions.gripper_flips.value,
        "image_sensitivity": None if sight is None else sight.ratio.value,
        "success_drop": None if evaluation.success is None else -evaluation.success.paired.difference,
        "perplexity_ratio": None if perplexity is None else perplexity.after / perplexity.before,
    }
