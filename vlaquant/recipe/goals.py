"""What a recipe asks of the result: a budget that precision is shared out under, and gates it has to pass."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from vlaquant.errors import RecipeError
from vlaquant.recipe.base import Bytes, GroupSize, Name, RecipePath, Section
from vlaquant.scheme import get_scheme


def _weight_only(names: tuple[str, ...]) -> tuple[str, ...]:
    for name in names:
        try:
            scheme = get_scheme(name)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if scheme.activation is not None:
            raise ValueError(
                f"{name} rounds activations, and the precision of weights alone is shared out; give the layers that "
                f"are to be {name} by rules, and keep them out of the budget with 'budget: {{layers: …}}'"
            )
    if len(set(names)) != len(names) or len(names) < 2:
        raise ValueError("needs at least two different schemes")
    return names


class Budget(Section):
    """Give each layer that a rule quantizes a scheme of its own: the least harm that fits.

    The limit is one of ``bits``, ``size``, ``latency`` with ``latency_ms``, or a tolerance (``max_action_l1``,
    ``max_success_drop``, or both). Without one there is nothing to choose, but ``vlaquant sensitivity`` has its
    candidates.

    Attributes:
        candidates: schemes to choose from; group size and symmetry are those of the rule of a layer.
        group_size: of all candidates, in place of the rules'.
        layers: only the layers that this pattern matches (a glob, or ``re:`` and a regular expression); others keep
            their rule's scheme.
        bits: stored bits of a weight on average over these layers, with scales and zero points.
        size: bytes of the written weights, all of the model.
        latency: JSON of ``vlaquant bench --shapes`` with the medians of every shape and candidate.
        latency_ms: the sum of the medians of these layers, each called once.
        tokens: rows of the input in that table.
        max_action_l1: lower the precision step by step as long as held-out actions stay that near to the float ones.
        max_success_drop: the same for the success rate of simulated episodes.
        steps: how many budgets a tolerance tries at most.
        method: how the harm of a scheme to a layer is found: one backward pass a sample, or a forward pass a scheme,
            layer and sample.
        samples: calibration samples that it is found on.
        scan: JSON of ``vlaquant sensitivity``, in place of finding it again.
    """

    candidates: Annotated[tuple[Name, ...], Field(strict=False), AfterValidator(_weight_only)] = (
        "w2a16",
        "w3a16",
        "w4a16",
        "w8a16",
    )
    group_size: GroupSize | None = None
    layers: Name | None = None
    bits: PositiveFloat | None = None
    size: Bytes | None = None
    latency: RecipePath | None = None
    latency_ms: PositiveFloat | None = None
    tokens: PositiveInt = 1
    max_action_l1: PositiveFloat | None = None
    max_success_drop: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    steps: PositiveInt = 12
    method: Literal["estimated", "measured"] = "estimated"
    samples: PositiveInt = 32
    scan: RecipePath | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if (self.latency is None) != (self.latency_ms is None):
            raise ValueError("'latency' (the table) and 'latency_ms' (the limit) go together")
        limits = [name for name in ("bits", "size", "latency") if getattr(self, name) is not None]
        if len(limits) + self.progressive > 1:
            raise ValueError(
                "has more than one limit; give bits, size, latency, or a tolerance (max_action_l1, max_success_drop)"
            )
        return self

    @property
    def progressive(self) -> bool:
        """Whether the limit is a tolerance."""
        return self.max_action_l1 is not None or self.max_success_drop is not None

    @property
    def limited(self) -> bool:
        """Whether there is a limit at all."""
        return self.progressive or any(value is not None for value in (self.bits, self.size, self.latency))


class Require(Section):
    """Gates: what the written model has to reach on held-out data, against the float one.

    Attributes:
        action_l1: largest mean absolute difference of a number of the action.
        bin_distance: largest mean distance of action tokens, in bins.
        gripper_flips: largest share of actions whose last number changes sign.
        image_sensitivity: least share r of the float policy's change of action when its images turn black; more than
            1 / r of it fails too.
        success_drop: largest loss of success rate in simulated episodes.
        perplexity_ratio: largest perplexity of a language model over that of the float one.
        path: held-out data of the calibration's kind. Episodes need none: their split ``evaluation`` is taken.
        samples: of it.
        rollouts: simulated episodes a task, for success_drop.
    """

    action_l1: PositiveFloat | None = None
    bin_distance: PositiveFloat | None = None
    gripper_flips: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    image_sensitivity: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    success_drop: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    perplexity_ratio: PositiveFloat | None = None
    path: RecipePath | None = None
    samples: PositiveInt = 64
    rollouts: PositiveInt = 20

    @model_validator(mode="after")
    def _some_gate(self) -> Self:
        if not self.gates:
            names = ", ".join(name for name in type(self).model_fields if name not in {"path", "samples", "rollouts"})
            raise ValueError(f"names no gate; known gates: {names}")
        return self

    @property
    def gates(self) -> dict[str, float]:
        """The gates that are set, by name."""
        values = self.model_dump(exclude={"path", "samples", "rollouts"})
        return {name: value for name, value in values.items() if value is not None}
