"""Any gymnasium environment with images as an :class:`~vlaquant.evaluate.environment.Environment`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import yaml
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError, RecipeError
from vlaquant.evaluate.environment import Image, Step, fitting, options_as
from vlaquant.families.observation import Observation

#: In the place of the key of an image: the whole observation, or a frame that the environment draws.
_WHOLE, _DRAWN = "observation", "render"
#: Before options that go to ``gymnasium.make``.
_MAKE = "make."
_MAPPINGS = ("clip", "unit")


@dataclass(frozen=True, slots=True)
class GymOptions:
    """Where to find things. Keys lead into nested mappings by dots, such as ``pixels.top``.

    Attributes:
        image: keys of the cameras' images, separated by commas, in the order of the policy's cameras; ``observation``
            if that is itself the image, ``render`` for the frame that the environment draws.
        state: key of the robot's state; empty for none.
        instruction: what the policy is told; empty for what the environment calls its ``instruction``.
        success: key in ``info``.
        action: ``clip`` for policies that act in the environment's units, ``unit`` to spread [-1, 1] over its bounds.
    """

    image: str = "pixels"
    state: str = ""
    instruction: str = ""
    success: str = "is_success"
    action: str = "clip"


def why_not() -> str | None:
    """Why there is no gymnasium here; None if there is one."""
    try:
        import gymnasium  # noqa: F401
    except ImportError:
        return "gymnasium is not installed: pip install gymnasium, and the package of your environment"
    return None


class GymEnvironment:
    """``gymnasium.make(name)``; names such as ``package:Name-v0`` import the package first.

    Source: the interface of gymnasium 1.x (Towers et al. 2024, arXiv:2407.17032).

    Raises:
        EvaluationError: no gymnasium, no such environment, or its actions are no box of numbers.
        RecipeError: an option that there is not.
    """

    def __init__(self, name: str, options: dict[str, str]) -> None:
        reason = why_not()
        if reason is not None:
            raise EvaluationError(f"cannot simulate {name}: {reason}")
        import gymnasium

        given = {key: value for key, value in options.items() if not key.startswith(_MAKE)}
        self._options = options_as(GymOptions, f"gymnasium:{name}", given)
        if self._options.action not in _MAPPINGS:
            raise RecipeError(f"--env-option action={self._options.action}: use {' or '.join(_MAPPINGS)}")
        made = {key.removeprefix(_MAKE): yaml.safe_load(value) for key, value in options.items() if key not in given}
        if self._options.image == _DRAWN:
            made.setdefault("render_mode", "rgb_array")
        try:
            self._env: Any = gymnasium.make(name, **made)
        except (gymnasium.error.Error, ImportError, TypeError) as error:
            raise EvaluationError(f"cannot simulate {name}: gymnasium.make: {error}") from error
        space = self._env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
            raise EvaluationError(f"{name}: its action space is {space}, and a policy gives a row of numbers")
        self._low, self._high = (np.asarray(end, dtype=np.float64) for end in (space.low, space.high))
        self.name = name
        self.instruction = self._options.instruction or str(getattr(self._env.unwrapped, "instruction", ""))
        if not self.instruction:
            raise RecipeError(f"gymnasium:{name} says no instruction; give --env-option instruction='what to do'")
        self._seen: Any = None

    @property
    def max_steps(self) -> int | None:
        """After which gymnasium itself ends an episode; None if it does not."""
        spec = self._env.spec
        return None if spec is None else spec.max_episode_steps

    def reset(self, seed: int) -> Step:
        """Start the episode that belongs to ``seed``."""
        self._seen, _ = self._env.reset(seed=seed)
        return Step(success=False)

    def step(self, action: NDArray[Any]) -> Step:
        """Do one action [dimension].

        Raises:
            EvaluationError: an action of another dimension, or ``info`` does not say whether the task is solved.
        """
        found = fitting(action, len(self._low), self.name).astype(np.float64)
        if self._options.action == "unit":
            found = self._low + (np.clip(found, -1.0, 1.0) + 1.0) / 2.0 * (self._high - self._low)
        found = np.clip(found, self._low, self._high).astype(self._env.action_space.dtype)
        self._seen, _, terminated, truncated, info = self._env.step(found)
        done, key = bool(terminated or truncated), self._options.success
        if done and key not in info:  # some say it only at the end
            raise EvaluationError(
                f"{self.name}: info has no {key!r} at the end of an episode, but {', '.join(info) or 'nothing'}; say "
                "which key means success with --env-option success=KEY"
            )
        return Step(success=bool(info.get(key, False)), done=done)

    def observe(self) -> Observation:
        """Images, instruction and state."""
        keys = self._options.image.split(",")
        images = tuple(PIL.Image.fromarray(self._image(key.strip())) for key in keys)
        state = None
        if self._options.state:
            state = np.asarray(self._look(self._options.state), dtype=np.float64).reshape(-1)
        return Observation(images, self.instruction, state, task=self.name)

    def render(self) -> Image:
        """The first camera's image."""
        return self._image(self._options.image.split(",")[0].strip())

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _image(self, key: str) -> Image:
        found = self._env.render() if key == _DRAWN else self._seen if key == _WHOLE else self._look(key)
        frame = np.asarray(found)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise EvaluationError(
                f"{self.name}: {key} is {frame.dtype} {list(frame.shape)}, and an image is uint8 [height, width, 3]; "
                "say where the images are with --env-option image=KEY"
            )
        return frame

    def _look(self, key: str) -> Any:
        found = self._seen
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                there = ", ".join(found) if isinstance(found, Mapping) else type(found).__name__
                raise EvaluationError(
                    f"{self.name}: no {key!r} in what it shows ({there}); say which key with --env-option image=KEY "
                    "and state=KEY"
                )
            found = found[part]
        return found
