"""Simulators as environments: what a policy is shown and does in each of them, and what is refused."""

from typing import Any

import libero_lookalike as lookalike
import numpy as np
import pytest
from PIL import Image
from tiny import openvla

from vlaquant.errors import EvaluationError, RecipeError
from vlaquant.evaluate import libero
from vlaquant.evaluate.environment import Environment
from vlaquant.evaluate.gym import GymEnvironment
from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.evaluate.metaworld import why_not as no_metaworld
from vlaquant.evaluate.simulators import METAWORLD, Simulator, parse_simulator

pytest.importorskip("gymnasium")
REACH = {"image": "views.top", "state": "agent"}


def reach(**options: str) -> Any:
    return GymEnvironment("made_gym:Reach-v0", REACH | options)


def test_a_gymnasium_environment() -> None:
    env: Environment = reach()
    assert env.instruction == "push the spot into the middle"
    assert not env.reset(3).success
    seen = env.observe()
    assert seen.image.size == (28, 28)
    assert seen.state is not None
    assert np.asarray(seen.image).sum() == 3 * 255
    assert np.array_equal(env.render(), np.asarray(seen.image))
    again = reach()
    again.reset(3)
    assert np.array_equal(again.observe().state, seen.state), "the seed decides the start"
    again.reset(4)
    assert not np.array_equal(again.observe().state, seen.state)
    steps = [env.step(np.array([1.5, 1.5, 0.0, 0.0])) for _ in range(6)]
    first = next(i for i, step in enumerate(steps) if step.success)
    assert steps[first].done
    assert not any(step.done for step in steps[:first])
    env.close()


def test_actions_are_clipped_or_spread_over_the_bounds() -> None:
    env = reach()
    env.reset(0)
    env.step(np.array([9.0, -1.0, 0.5, -9.0]))
    assert env._env.unwrapped.done_actions[-1].tolist() == [2.0, -1.0, 0.5, 0.0]
    env = reach(action="unit")
    env.reset(0)
    env.step(np.array([1.0, -0.5, 0.0, -3.0]))
    assert env._env.unwrapped.done_actions[-1].tolist() == pytest.approx([2.0, -1.0, 0.5, 0.0])


def test_the_time_limit_ends_an_episode() -> None:
    env = reach()
    assert env.max_steps == 12
    env.reset(0)
    steps = [env.step(np.zeros(4)) for _ in range(12)]
    assert [step.done for step in steps] == [False] * 11 + [True]
    assert not steps[-1].success


def test_success_that_is_only_told_at_the_end() -> None:
    env = GymEnvironment("made_gym:Reach-v0", {**REACH, "make.late": "true"})
    env.reset(0)
    steps = [env.step(np.array([1.5, 1.5, 0.0, 0.0])) for _ in range(6)]
    assert any(step.success for step in steps)


def test_a_frame_that_the_environment_draws() -> None:
    env = GymEnvironment("made_gym:Drawn-v0", {"image": "render", "instruction": "go", "success": "reached"})
    env.reset(0)
    assert np.asarray(env.observe().image)[0, 0].tolist() == [7, 7, 7]
    assert env.observe().state is None
    assert env.step(np.zeros(4)).success


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Reach-v0", {"image": "pixels"}, "no 'pixels' in what it shows .views, agent"),
        ("Reach-v0", {"image": "agent"}, "an image is uint8"),
        ("Reach-v0", {"imagge": "x"}, "did you mean 'image'"),
        ("Reach-v0", {"action": "twist"}, "use clip or unit"),
        ("Reach-v0", {"make.nothing": "1"}, "gymnasium.make"),
        ("Drawn-v0", {"image": "render"}, "says no instruction"),
        ("Nowhere-v0", {}, "gymnasium.make"),
        ("Buttons-v0", {}, "a policy gives a row of numbers"),
    ],
)
def test_what_gymnasium_environments_refuse(name: str, options: dict[str, str], message: str) -> None:
    def look() -> None:
        env = GymEnvironment(f"made_gym:{name}", options)
        env.reset(0)
        env.observe()

    with pytest.raises((EvaluationError, RecipeError), match=message):
        look()


def test_success_under_another_name_is_asked_for() -> None:
    env = GymEnvironment("made_gym:Drawn-v0", {"image": "render", "instruction": "go"})
    env.reset(0)
    with pytest.raises(EvaluationError, match=r"info has no 'is_success' .* but reached"):
        env.step(np.zeros(4))


def test_an_action_of_another_robot_is_refused() -> None:
    env = reach()
    env.reset(0)
    with pytest.raises(EvaluationError, match=r"takes actions of 4 numbers, and the policy gives shape \[7\]"):
        env.step(np.zeros(7))


def test_libero(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Against a look-alike of its interface: LIBERO itself brings a gigabyte of assets."""
    lookalike.install(monkeypatch)
    simulator = parse_simulator("libero:libero_goal", ["cameras=agentview,robot0_eye_in_hand", "size=64"])
    assert simulator.tasks == ("pick_up_the_soup", "open_the_drawer")
    assert simulator.max_steps == 300
    one = parse_simulator("libero:libero_goal/open_the_drawer")
    assert (one.tasks, one.max_steps) == (("open_the_drawer",), 300)
    assert one.make("open_the_drawer", 224).instruction == "open the drawer"
    lookalike.OffScreenRenderEnv.made.clear()
    with pytest.raises(RecipeError, match="no such task; libero_goal has pick_up_the_soup, open_the_drawer"):
        parse_simulator("libero:libero_goal/close_the_drawer").tasks  # noqa: B018
    env = simulator.make("open_the_drawer", 224)
    (made,) = lookalike.OffScreenRenderEnv.made
    assert made.file.endswith("bddl_files/libero_goal/open_the_drawer.bddl")
    assert made.size == (64, 64)
    assert env.instruction == "open the drawer"
    env.reset(91_003)
    assert made.calls == [("seed", 91_003), "reset", ("state", 1000.0 + 3 * 5)]
    assert made.actions == [[0.0] * 6 + [-1.0]] * 10, "objects fall first"
    seen = env.observe()
    assert len(seen.images) == 2
    assert np.asarray(seen.images[0])[-1, -1].tolist() == [255] * 3, "turned by 180 degrees"
    assert seen.state is not None
    assert seen.state.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.5, 0.0, 0.0, 0.04, -0.04])
    assert not env.step(np.array([0.1, 0, 0, 0, 0, 0, 1.0])).success
    assert made.actions[-1] == pytest.approx([0.1, 0, 0, 0, 0, 0, -1.0]), "1 is open, and −1 there"
    env.step(np.zeros(7))
    assert made.actions[-1][-1] == 1.0
    assert env.step(np.zeros(7)).success
    env.close()
    assert made.calls[-1] == "close"
    said = capsys.readouterr()
    assert said.out == "", "results go there"
    assert "[info] Applying task order" in said.err
    other = libero.LiberoTask("libero_goal", "open_the_drawer", {"gripper": "libero"})
    other.reset(0)
    other.step(np.array([0, 0, 0, 0, 0, 0, 0.25]))
    assert lookalike.OffScreenRenderEnv.made[-1].actions[-1][-1] == 0.25
    with pytest.raises(RecipeError, match="use openvla or libero"):
        libero.LiberoTask("libero_goal", "open_the_drawer", {"gripper": "x"})
    with pytest.raises(RecipeError, match="crop=most: is no positive number"):
        libero.LiberoTask("libero_goal", "open_the_drawer", {"crop": "most"})
    other = libero.LiberoTask("libero_goal", "open_the_drawer", {"cameras": "side"})
    other.reset(0)
    with pytest.raises(RecipeError, match="shows no 'side', but agentview, robot0_eye_in_hand"):
        other.observe()
    with pytest.raises(RecipeError, match="no such suite; known: libero_goal"):
        libero.tasks("libero_moon")


def test_the_middle_of_an_image() -> None:
    """A quarter of the area is half of each side."""
    frame = np.zeros((8, 8, 3), np.uint8)
    frame[2:6, 2:6] = 200
    image = Image.fromarray(frame)
    shown = np.asarray(libero.middle_of(image, 0.25))
    assert shown[1:-1, 1:-1].min() == 200
    assert shown.min() > 100, "only the seam is mixed with what lies beyond"
    assert libero.middle_of(image, 0.25).size == (8, 8)
    assert libero.middle_of(image, 1.0) is image


def test_a_rotation_as_axis_and_angle() -> None:
    half = np.sqrt(0.5)
    assert libero.axis_angle(np.array([0.0, half, 0.0, half])).tolist() == pytest.approx([0.0, np.pi / 2, 0.0])
    assert libero.axis_angle(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == [0.0, 0.0, 0.0]


def test_libero_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "libero", None)
    reason = libero.why_not()
    assert reason is not None
    assert "pip install" in reason
    with pytest.raises(EvaluationError, match="LIBERO is not installed"):
        libero.tasks("libero_goal")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("mujoco", [], "unknown simulator 'mujoco'; known: metaworld, gymnasium, libero"),
        ("gymnasium", [], "write gymnasium:NAME"),
        ("metaworld", ["image"], "write KEY=VALUE"),
        ("metaworld:fly", [], "unknown task; known tasks: button"),
    ],
)
def test_simulators_that_make_no_sense(text: str, options: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _ = parse_simulator(text, options).tasks


def test_simulators_by_name() -> None:
    assert parse_simulator("metaworld") == METAWORLD
    assert METAWORLD.tasks == tuple(INSTRUCTIONS)
    assert parse_simulator("metaworld:window-open").tasks == ("window-open",)
    found = parse_simulator("gymnasium:made_gym:Reach-v0", ["image=views.top", "instruction=a = b"])
    assert found == Simulator("gymnasium", "made_gym:Reach-v0", (("image", "views.top"), ("instruction", "a = b")))
    assert str(found) == "gymnasium:made_gym:Reach-v0"
    assert found.tasks == ("made_gym:Reach-v0",)
    assert found.max_steps == 12
    drawn = parse_simulator("gymnasium:made_gym:Drawn-v0", ["image=render", "instruction=go"])
    with pytest.raises(RecipeError, match="--max-steps"):
        _ = drawn.max_steps


@pytest.mark.skipif(no_metaworld() is not None, reason=str(no_metaworld()))
def test_metaworld_is_an_environment() -> None:
    env = METAWORLD.make("window-open", 32)
    env.reset(91_000)
    seen = env.observe()
    assert (seen.image.size, seen.instruction) == ((32, 32), "open the window")
    assert seen.state is not None
    assert seen.state.shape == (4,)
    frame = np.asarray(seen.image)
    assert frame.std() > 10
    model: Any = openvla()
    by_image, by_array = (model.encode([one], "push")[1] for one in (seen.image, frame))
    assert bool((by_image == by_array).all()), "a PIL image is the same to a policy as the frame"
    step = env.step(np.array([0.0, 1.0, 0.0, 0.0]))
    assert not step.success
    with pytest.raises(EvaluationError, match="trained for another robot"):
        env.step(np.zeros(7))
    env.reset(91_000)
    assert np.array_equal(np.asarray(env.observe().image), frame), "the seed decides the start"
    env.close()
