"""MetaWorld tabletop tasks with a camera: where the demo policy learns and is measured.

MetaWorld (Yu et al. 2019) simulates a Sawyer arm in MuJoCo and ships a scripted expert for every task.
Rendering runs without a GPU and without a screen through EGL. Needs the extra ``eval``.
"""

import ctypes.util
import os
from types import TracebackType
from typing import Any, Self

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.environment import Image, Step, fitting
from vlaquant.families.observation import Observation

os.environ.setdefault("MUJOCO_GL", "egl")
os.environ.setdefault("PYOPENGL_PLATFORM", "egl")
os.environ.setdefault("LP_NUM_THREADS", "1")

#: Task name -> the instruction that the policy is given.
INSTRUCTIONS = {
    "button-press-topdown": "press the button from above",
    "faucet-open": "turn on the faucet",
    "handle-press": "press the handle down",
    "window-open": "open the window",
    "window-close": "close the window",
}

#: The camera of lerobot's MetaWorld environment; it is mounted upside down, so frames are rotated by 180 degrees.
_CAMERA = "corner2"
_CAMERA_POSITION = (0.75, 0.075, 0.7)

#: Steps after which an episode counts as failed; the scripted experts need 33 to 90 on average.
MAX_STEPS = 200
#: Numbers of an action: velocity in x, y and z, and the gripper. As many of the state are the robot's own.
_DIMENSION = 4

Action = NDArray[np.float32]


def why_not() -> str | None:
    """Why episodes cannot be rendered on this machine, with the command that mends it; None if they can."""
    try:
        import metaworld  # noqa: F401
    except ImportError:
        return "metaworld is not installed: pip install 'vlaquant[eval]'"
    if ctypes.util.find_library("EGL") is None:
        return "the EGL library is missing: apt-get install -y libegl1 libgl1-mesa-dri libgles2"
    return None


class MetaWorldTask:
    """One task with a seeded stream of initial states; ``reset(seed)`` gives the same episode everywhere.

    Frames are uint8 [size, size, 3]. Actions are float [4] in [-1, 1]: xyz velocity and gripper. The state of a
    :class:`~vlaquant.evaluate.environment.Step` is the whole one [39], for the expert.
    """

    def __init__(self, task: str, image_size: int) -> None:
        reason = why_not()
        if reason is not None:
            raise EvaluationError(f"cannot simulate {task}: {reason}")
        if task not in INSTRUCTIONS:
            raise EvaluationError(f"unknown task {task!r}; known tasks: {', '.join(INSTRUCTIONS)}")
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
        from metaworld.policies import ENV_POLICY_MAP

        self.task = task
        self.instruction = INSTRUCTIONS[task]
        self.image_size = image_size
        make_env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"]
        self._expert = ENV_POLICY_MAP[f"{task}-v3"]()
        self._env: Any = make_env(seed=0)
        self._place_camera()
        self._renderer: Any = None
        self._state: NDArray[np.float64] = np.zeros(0)

    def reset(self, seed: int) -> Step:
        """Start the episode that belongs to ``seed``."""
        self._env._freeze_rand_vec = False  # noqa: SLF001  the only switch there is
        self._env.seeded_rand_vec = True
        self._env.seed(seed)
        state, _ = self._env.reset(seed=seed)
        self._state = np.asarray(state, dtype=np.float64)
        return Step(success=False, state=self._state)

    def step(self, action: NDArray[Any]) -> Step:
        """Apply one action [4]; values outside [-1, 1] are clipped as the simulator would."""
        given = fitting(action, _DIMENSION, f"MetaWorld's {self.task}")
        state, _, _, _, info = self._env.step(np.clip(given, -1.0, 1.0))
        self._state, success = np.asarray(state, dtype=np.float64), bool(info["success"])
        return Step(success=success, done=success, state=self._state)

    def observe(self) -> Observation:
        """The camera frame, the instruction, and of the state the hand's position and the gripper [4]."""
        image = PIL.Image.fromarray(self.render())
        return Observation((image,), self.instruction, self._state[:_DIMENSION], task=self.task)

    def expert_action(self, state: NDArray[np.float64]) -> Action:
        """The scripted expert's action [4] in [-1, 1] for the state [39]."""
        action: Action = np.clip(self._expert.get_action(state), -1.0, 1.0).astype(np.float32)
        return action

    def render(self) -> Image:
        """The camera frame, uint8 [size, size, 3]."""
        if self._renderer is None:
            self._renderer = self._make_renderer()
        self._renderer.update_scene(self._env.data, camera=_CAMERA)
        frame = self._renderer.render()
        return np.ascontiguousarray(frame[::-1, ::-1])

    def _place_camera(self) -> None:
        """Move the camera; the next reset computes its pose, so this comes before the first one."""
        import mujoco

        camera = mujoco.mj_name2id(self._env.model, mujoco.mjtObj.mjOBJ_CAMERA, _CAMERA)
        self._env.model.cam_pos[camera] = _CAMERA_POSITION

    def _make_renderer(self) -> Any:
        """A renderer without shadows, reflections and multisampling: 20 ms a frame on a CPU in place of 330 ms."""
        import mujoco

        model = self._env.model
        model.vis.quality.offsamples = 0  # must be set before the renderer is made
        renderer = mujoco.Renderer(model, height=self.image_size, width=self.image_size)
        for flag in ("SHADOW", "REFLECTION", "SKYBOX", "HAZE", "FOG"):
            renderer.scene.flags[getattr(mujoco.mjtRndFlag, f"mjRND_{flag}")] = 0
        return renderer

    def close(self) -> None:
        """Release the renderer (EGL complains at interpreter exit otherwise)."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
