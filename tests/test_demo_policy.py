"""The shipped policy: complete, small, sighted; and the recipes that are made for it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare_recipes import recipe
from transformers import AutoConfig

import vlaquant
from vlaquant.evaluate.actions import compare
from vlaquant.families.data import load_observations
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from vlaquant.recipe import load_recipe

ROOT = Path(__file__).parent.parent
POLICY = ROOT / "examples" / "demo_policy"
EPISODES = ROOT / "examples" / "demo_episodes"


@pytest.fixture(scope="module")
def policy() -> OpenVLAForActionPrediction:
    model = vlaquant.load(POLICY)
    assert isinstance(model, OpenVLAForActionPrediction)
    return model


def test_it_is_an_openvla_directory_under_25_megabytes() -> None:
    assert isinstance(AutoConfig.from_pretrained(POLICY), OpenVLAConfig)
    loading: Any = OpenVLAForActionPrediction.from_pretrained
    _, info = loading(POLICY, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    files = [path for folder in (POLICY, EPISODES) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6


def test_image_and_instruction_reach_the_action(policy: OpenVLAForActionPrediction) -> None:
    seen = load_observations(EPISODES, "evaluation")
    pressing = next(o for o in seen if o.task == "button-press-topdown")
    opening = next(o for o in seen if o.task == "window-open")
    action = policy.predict_action(pressing.image, pressing.instruction)
    assert action.shape == (4, 4)
    assert not np.array_equal(action, policy.predict_action(opening.image, pressing.instruction))
    told = policy.predict_action(opening.image, "open the window")
    assert not np.array_equal(told, policy.predict_action(opening.image, "close the window"))
    policy.check_sight(*policy.encode(pressing.image, pressing.instruction))


def test_it_acts_like_the_demonstrations(policy: OpenVLAForActionPrediction) -> None:
    seen = load_observations(EPISODES, "evaluation", 40)
    error = compare(policy, policy, seen, lambda items: items).figures
    always_still = float(np.mean([np.abs(o.action).mean() for o in seen if o.action is not None]))
    assert error.demonstration.candidate.value < 0.3 * always_still


def test_calibration_and_evaluation_episodes_are_different() -> None:
    episodes = {s: {(o.task, o.episode) for o in load_observations(EPISODES, s)} for s in ("calibration", "evaluation")}
    assert episodes["calibration"].isdisjoint(episodes["evaluation"])
    assert len(episodes["calibration"]) == len(episodes["evaluation"]) > 0


@pytest.mark.parametrize("name", ["demo_w4a16_awq", "demo_w4a16_gptq", "demo_w8a8_smoothquant"])
def test_demo_recipes(name: str, policy: OpenVLAForActionPrediction) -> None:
    # A quarter of the shipped recipe's 64 samples: `make demo` takes them all
    samples = load_observations(EPISODES, "calibration", 16)
    shipped = load_recipe(ROOT / "configs" / f"{name}.yaml").model_copy(update={"require": None})  # nothing is written
    quantized = vlaquant.quantize(POLICY, shipped, samples=samples).model
    assert isinstance(quantized, OpenVLAForActionPrediction)
    error = compare(quantized, policy, load_observations(EPISODES, "evaluation", 30), lambda items: items).figures
    assert error.bin_distance is not None
    assert error.bin_distance.value < 8.0  # of 255; a policy that acts at random is above 80
    assert error.gripper_flips.value < 0.02


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_and_awq_beat_rounding_on_output_error(bits: int) -> None:
    samples = load_observations(EPISODES, "calibration", 12)
    losses = {
        row: vlaquant.quantize(POLICY, recipe(f"w{bits} {row}"), samples=samples).mean_relative_loss
        for row in ("rtn", "awq", "gptq")
    }
    assert losses["rtn"] is not None
    assert losses["awq"] is not None
    assert losses["gptq"] is not None
    assert losses["awq"] < 0.9 * losses["rtn"]
    assert losses["gptq"] < 0.7 * losses["rtn"]
