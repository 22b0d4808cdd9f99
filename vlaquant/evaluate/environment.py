"""What a simulator must be, for a policy to be driven in it."""

from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError, RecipeError
from vlaquant.families.observation import Observation

#: A frame, uint8 [height, width, 3].
Image = NDArray[np.uint8]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What an environment answers.

    Attributes:
        success: whether the task is solved.
        done: whether the episode is over, solved or not.
        state: numbers that the simulator gives of the robot and the task; None if it gives none.
    """

    success: bool
    done: bool = False
    state: NDArray[np.float64] | None = None


class Environment(Protocol):
    """One task. An episode is ``reset``, and then ``observe`` whenever the policy is asked, and a ``step`` an action.

    What the robot sees is asked for and not given with every step: drawing it takes longer than the step, and a policy
    that answers in chunks looks only once a chunk.
    """

    @property
    def instruction(self) -> str:
        """What the policy is told to do."""
        ...

    def reset(self, seed: int) -> Step:
        """Start the episode that belongs to ``seed``: the same start in every process, for every policy."""
        ...

    def observe(self) -> Observation:
        """What the policy is shown now: images, instruction and state."""
        ...

    def step(self, action: NDArray[Any]) -> Step:
        """Do one action [dimension], in the units that the policy gives it in.

        Raises:
            EvaluationError: an action of another dimension.
        """
        ...

    def render(self) -> Image:
        """A frame for a video."""
        ...

    def close(self) -> None:
        """Let go of the simulator."""
        ...


def options_as(kind: type[_T], name: str, given: dict[str, str]) -> _T:
    """The ``--env-option KEY=VALUE`` of an environment, as a dataclass whose fields are text.

    Raises:
        RecipeError: a key that it has not, with the nearest one.
    """
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known options: {', '.join(known) or 'none'}"
            raise RecipeError(f"--env-option {key}: {name} has no such option; {hint}")
    return kind(**given)


def fitting(action: NDArray[Any], dimension: int, where: str) -> NDArray[np.float32]:
    """The action [dimension] as float32.

    Raises:
        EvaluationError: it is of another dimension.
    """
    found = np.asarray(action, dtype=np.float32)
    if found.shape != (dimension,):
        raise EvaluationError(
            f"{where} takes actions of {dimension} numbers, and the policy gives shape {list(found.shape)}: it was "
            "trained for another robot"
        )
    return found
