"""Small gymnasium environments; ``made_gym:Name-v0`` registers them, in every process."""

from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

SIZE = 28
STEPS = 12
#: Both coordinates have to be beyond it.
GOAL = 12


class Reach(gymnasium.Env):  # type: ignore[misc]  # may not be there
    """A spot has to be moved to the middle of the picture, or beyond. It starts where the seed says."""

    instruction = "push the spot into the middle"
    observation_space = gymnasium.spaces.Dict(
        {
            "views": gymnasium.spaces.Dict({"top": gymnasium.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)}),
            "agent": gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64),
        }
    )
    action_space = gymnasium.spaces.Box(
        np.array([-2.0, -2.0, 0.0, 0.0]), np.array([2.0, 2.0, 1.0, 1.0]), dtype=np.float64
    )

    def __init__(self, *, late: bool = False) -> None:
        self.late, self.done_actions = late, list[NDArray[Any]]()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        self.place, self.steps = self.np_random.uniform(4, 10, 2), 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.done_actions.append(np.asarray(action))
        self.place, self.steps = self.place + np.asarray(action)[:2], self.steps + 1
        solved = bool(self.place.min() > GOAL)
        info = {} if self.late and not solved else {"is_success": solved}
        return self._seen(), 0.0, solved, False, info

    def _seen(self) -> Any:
        frame = np.zeros((SIZE, SIZE, 3), np.uint8)
        x, y = np.clip(self.place, 0, SIZE - 1).astype(int)
        frame[y, x] = 255
        return {"views": {"top": frame}, "agent": self.place.copy()}


class Drawn(gymnasium.Env):  # type: ignore[misc]
    """Shows numbers, and draws itself; it never says whether it is solved, nor what is to be done."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed, options=options)
        return np.zeros(3), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return np.zeros(3), 0.0, True, False, {"reached": True}

    def render(self) -> Any:
        return np.full((SIZE, SIZE, 3), 7, np.uint8)


class _Buttons(Drawn):
    action_space = gymnasium.spaces.Discrete(3)


gymnasium.register("Reach-v0", Reach, max_episode_steps=STEPS)
gymnasium.register("Drawn-v0", Drawn)
gymnasium.register("Buttons-v0", _Buttons)
