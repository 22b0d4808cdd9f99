"""Stands for the package LIBERO: the same modules, functions, shapes and conventions, and no simulator.

Written from LIBERO's source (libero/libero/__init__.py, benchmark/__init__.py, envs/env_wrapper.py). What it cannot
show is that the real one still has them: that takes LIBERO itself.
"""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

LANGUAGES = ("pick up the soup", "open the drawer")
STATES = 50


class Task(NamedTuple):
    name: str
    language: str
    problem: str
    problem_folder: str
    bddl_file: str
    init_states_file: str


class Suite:
    def __init__(self, task_order_index: int = 0) -> None:
        print("[info] Applying task order")  # noqa: T201 as the real one
        self.tasks = [
            Task(one.replace(" ", "_"), one, "Libero", "libero_goal", f"{one.replace(' ', '_')}.bddl", "init")
            for one in LANGUAGES
        ]
        self.n_tasks = len(self.tasks)

    def get_task(self, i: int) -> Task:
        return self.tasks[i]

    def get_task_init_states(self, i: int) -> Any:
        return np.arange(STATES * 5, dtype=float).reshape(STATES, 5) + 1000 * i


class OffScreenRenderEnv:
    """Notes what is done to it; images say from which corner they are."""

    made: list["OffScreenRenderEnv"] = []  # noqa: RUF012

    def __init__(self, bddl_file_name: str, camera_heights: int, camera_widths: int) -> None:
        print("[info] using the task's scene")  # noqa: T201
        self.file, self.size = bddl_file_name, (camera_heights, camera_widths)
        self.calls: list[Any] = []
        self.actions: list[Any] = []
        OffScreenRenderEnv.made.append(self)

    def seed(self, seed: int) -> None:
        self.calls.append(("seed", seed))

    def reset(self) -> Any:
        self.calls.append("reset")
        self.actions = []
        return self._seen()

    def set_init_state(self, state: Any) -> Any:
        self.calls.append(("state", float(state[0])))
        return self._seen()

    def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        assert isinstance(action, list)
        assert len(action) == 7
        self.actions.append(action)
        return self._seen(), 0.0, len(self.actions) >= 13, {}

    def close(self) -> None:
        self.calls.append("close")

    def _seen(self) -> dict[str, Any]:
        frame = np.zeros((*self.size, 3), np.uint8)
        frame[0, 0] = 255  # the renderer's first row is the lowest one
        return {
            "agentview_image": frame,
            "robot0_eye_in_hand_image": frame + 1,
            "robot0_eef_pos": np.array([0.1, 0.2, 0.3]),
            "robot0_eef_quat": np.array([np.sin(0.25), 0.0, 0.0, np.cos(0.25)]),
            "robot0_gripper_qpos": np.array([0.04, -0.04]),
        }


def install(patch: pytest.MonkeyPatch) -> None:
    """Make ``import libero.libero`` find this."""
    outer, inner, benchmark, envs = (
        ModuleType(name) for name in ("libero", "libero.libero", "libero.libero.benchmark", "libero.libero.envs")
    )
    modules: dict[str, Any] = {one.__name__: one for one in (outer, inner, benchmark, envs)}
    modules["libero"].libero = inner
    modules["libero.libero"].benchmark, modules["libero.libero"].envs = benchmark, envs
    modules["libero.libero"].get_libero_path = lambda key: str(Path("libero", key))
    modules["libero.libero.benchmark"].get_benchmark_dict = lambda: {"libero_goal": Suite}
    modules["libero.libero.envs"].OffScreenRenderEnv = OffScreenRenderEnv
    for name, module in modules.items():
        patch.setitem(sys.modules, name, module)
    OffScreenRenderEnv.made.clear()
