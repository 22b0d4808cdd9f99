"""LIBERO itself behind the adapter; ``make test-libero`` installs it in an environment of its own."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from vlaquant.evaluate import libero

pytestmark = [
    pytest.mark.libero,
    pytest.mark.filterwarnings("ignore"),  # LIBERO's own, and its simulator's
    pytest.mark.skipif(importlib.util.find_spec("libero") is None, reason="LIBERO is not installed; make test-libero"),
]
SUITE, THING = "libero_object", "salad_dressing"
TASK = f"pick_up_the_{THING}_and_place_it_in_the_basket"
OPEN, CLOSED = 1.0, 0.0  # as OpenVLA says it
#: Of the end effector when it holds a thing, below the thing's own position; metres.
GRIP = 0.015


@pytest.fixture(scope="module")
def env() -> Iterator[libero.LiberoTask]:
    made = libero.LiberoTask(SUITE, TASK, {"size": "128"})
    yield made
    made.close()


def action(move: NDArray[np.float64], gripper: float) -> NDArray[np.float64]:
    """Towards a place, without turning; one unit is 5 cm."""
    return np.array([*np.clip(10 * move, -1, 1), 0.0, 0.0, 0.0, gripper])


def position(env: libero.LiberoTask, name: str) -> NDArray[np.float64]:
    return np.asarray(env._seen[f"{name}_pos"])


def expert(env: libero.LiberoTask) -> Iterator[NDArray[np.float64]]:
    """Above the thing, down, grip, up, above the basket, let go."""
    start = position(env, f"{THING}_1").copy()
    basket = position(env, "basket_1").copy()
    up = np.array([0.0, 0.0, 1.0])
    above, at, lifted = start + 0.1 * up, start - GRIP * up, start + 0.3 * up
    for target, gripper, least, most in (
        (above, OPEN, 0, 60),
        (at, OPEN, 0, 40),
        (at, CLOSED, 15, 15),
        (lifted, CLOSED, 0, 40),
        (np.array([*basket[:2], lifted[2]]), CLOSED, 0, 60),
        (np.array([*basket[:2], start[2] + 0.15]), CLOSED, 0, 40),
        (np.array([*basket[:2], start[2] + 0.15]), OPEN, 20, 20),
    ):
        for step in range(most):
            apart = target - position(env, "robot0_eef")
            if step >= least and np.abs(apart).max() < 0.01:
                break
            yield action(apart, gripper)


def test_a_task_is_what_it_says(env: libero.LiberoTask) -> None:
    assert TASK in libero.tasks(SUITE)
    assert env.instruction == "pick up the salad dressing and place it in the basket"
    assert not env.reset(0).success
    seen = env.observe()
    assert seen.images[0] is not None
    assert seen.images[0].size == (128, 128)
    assert seen.instruction == env.instruction
    assert seen.state is not None
    first = np.asarray(seen.state)
    assert first.shape == (8,)
    env.reset(1)
    second = np.asarray(env.observe().state)
    env.reset(0)
    assert np.abs(first - np.asarray(env.observe().state)).max() < 1e-3 < np.abs(first - second).max()


def test_actions_move_what_they_should(env: libero.LiberoTask) -> None:
    env.reset(0)
    before = np.asarray(env.observe().state)
    for _ in range(5):
        env.step(action(np.array([0.0, 0.0, 0.1]), CLOSED))
    after = np.asarray(env.observe().state)
    assert after[2] > before[2] + 0.02
    assert np.ptp(after[-2:]) < np.ptp(before[-2:]) - 0.01
    for _ in range(5):
        env.step(action(np.zeros(3), OPEN))
    assert np.ptp(np.asarray(env.observe().state)[-2:]) > np.ptp(after[-2:]) + 0.01


def test_success_is_seen_and_nothing_is_not_success(env: libero.LiberoTask) -> None:
    env.reset(0)
    assert not any(env.step(action(np.zeros(3), OPEN)).success for _ in range(5))
    env.reset(0)
    assert any(env.step(chosen).success for chosen in expert(env))


def test_only_results_go_to_stdout() -> None:
    program = f"from vlaquant.evaluate.libero import LiberoTask; LiberoTask({SUITE!r}, {TASK!r}, {{}}).reset(0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == ""
