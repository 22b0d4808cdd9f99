"""OpenVLA-OFT: heads beside the weights, several cameras, one pass in which every token sees every other."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracles_oft
import pytest
import torch
from oracles_oft import Sizes
from tiny import ACTION
from tiny_oft import (
    CAMERAS,
    CHUNK,
    HEAD_FILE,
    PROPRIO_FILE,
    STATE,
    STATISTICS,
    heads,
    images_of,
    oft_observations,
    save_oft,
)
from torch import Tensor

import vlaquant
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import FAMILIES
from vlaquant.models.openvla import OpenVLAForActionPrediction

FAMILY = FAMILIES["openvla"]
SIZES = Sizes(depth=3, vision_heads=2, patch=14, layers=2, heads=2, blocks=2, chunk=CHUNK, dimension=ACTION)
SAMPLE = oft_observations(1)[0]
IMAGES = images_of(SAMPLE)
EXACT = 1e-5


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_oft(tmp_path_factory.mktemp("oft") / "source")


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """For tests that change it."""
    return Path(shutil.copytree(source, tmp_path / "source"))


@pytest.fixture
def policy(source: Path) -> OpenVLAForActionPrediction:
    return load(source)


def load(directory: Path) -> OpenVLAForActionPrediction:
    model = vlaquant.load(directory)
    assert isinstance(model, OpenVLAForActionPrediction)
    return model


@torch.no_grad()
def error(model: OpenVLAForActionPrediction, inputs: dict[str, Tensor]) -> float:
    """Largest difference of the normalised action to the one that is written out."""
    images = list(inputs["pixel_values"][0].unflatten(0, (model.config.num_images_in_input, 6)))
    state = inputs["proprio"][0] if "proprio" in inputs else None
    wanted = oracles_oft.action(model.state_dict(), SIZES, inputs["input_ids"][0].tolist(), images, state)
    got = FAMILY.run(model, inputs)
    assert got.shape == (1, CHUNK, ACTION)
    return float((got[0] - wanted).abs().max())


@pytest.mark.parametrize(("cameras", "proprio"), [(1, 1), (2, 1), (3, 0)])
def test_the_action_is_that_of_the_published_description(tmp_path: Path, cameras: int, proprio: int) -> None:
    said = {"action_chunk": CHUNK, "num_images_in_input": cameras}
    model = load(save_oft(tmp_path / "source", said=said, proprio=bool(proprio)))
    images = (*SAMPLE.images, *oft_observations(1, seed=1)[0].images)[:cameras]
    inputs = FAMILY.inputs(model, replace(SAMPLE, images=images))
    assert error(model, inputs) < EXACT
    assert model.image_tokens == cameras * 4


def _causal(embeddings: Tensor) -> Tensor:
    tokens = embeddings.shape[1]
    return torch.full((1, 1, tokens, tokens), -1e9).triu(1)


def test_a_causal_mask_is_noticed(policy: OpenVLAForActionPrediction, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaquant.models.openvla.modeling.sees_everything", _causal)
    assert error(policy, FAMILY.inputs(policy, SAMPLE)) > 100 * EXACT


def test_positions_that_are_one_off_are_noticed(policy: OpenVLAForActionPrediction) -> None:
    assert policy.action_head is not None
    policy.action_head.register_forward_pre_hook(lambda _, args: (args[0].roll(1, dims=1),))
    assert error(policy, FAMILY.inputs(policy, SAMPLE)) > 100 * EXACT


@torch.no_grad()
def test_images_in_another_order_are_noticed(policy: OpenVLAForActionPrediction) -> None:
    inputs = FAMILY.inputs(policy, SAMPLE)
    swapped = inputs | {"pixel_values": inputs["pixel_values"].unflatten(1, (2, 6)).flip(1).flatten(1, 2)}
    assert float((FAMILY.run(policy, inputs) - FAMILY.run(policy, swapped)).abs().max()) > 10 * EXACT


@pytest.mark.parametrize(("kind", "low", "high"), [("q99", "q01", "q99"), ("min_max", "min", "max")])
def test_actions_and_states_have_the_units_of_the_dataset(copied: Path, kind: str, low: str, high: str) -> None:
    said = {"action_chunk": CHUNK, "num_images_in_input": CAMERAS, "action_normalization": kind}
    (copied / "oft.json").write_text(json.dumps(said), encoding="utf-8")
    model = load(copied)
    inputs = FAMILY.inputs(model, SAMPLE)
    normalized = FAMILY.run(model, inputs)[0].double().detach().numpy()
    stats: Any = STATISTICS["kitchen"]["action"]
    wanted = normalized.copy()
    for number in range(ACTION - 1):  # the mask leaves out the last
        span = stats[high][number] - stats[low][number]
        wanted[:, number] = stats[low][number] + (normalized[:, number] + 1.0) / 2.0 * span
    action = model.predict_action(IMAGES, "push", state=SAMPLE.state)
    np.testing.assert_allclose(action, wanted, rtol=0, atol=1e-12)
    assert FAMILY.act is not None
    assert np.array_equal(FAMILY.act(model, inputs).numpy(), action)
    states: Any = STATISTICS["kitchen"]["proprio"]
    assert SAMPLE.state is not None
    unit = 2.0 * (SAMPLE.state - states[low]) / (np.array(states[high]) - states[low]) - 1.0
    np.testing.assert_allclose(inputs["proprio"][0], unit.clip(-1.0, 1.0), rtol=0, atol=1e-6)
    assert (np.abs(unit) > 1.0).any() == (kind == "q99")


def test_the_state_reaches_the_action(policy: OpenVLAForActionPrediction) -> None:
    still = policy.predict_action(IMAGES, "push", state=np.zeros(STATE))
    assert np.abs(policy.predict_action(IMAGES, "push", state=SAMPLE.state) - still).max() > 1e-4


def test_heads_are_those_of_the_files(source: Path, policy: OpenVLAForActionPrediction, tmp_path: Path) -> None:
    state = policy.state_dict()
    wanted = {
        f"{file.partition('--')[0]}.{name}": tensor
        for file, tensors in heads().items()
        for name, tensor in tensors.items()
    }
    assert {name for name in state if name.startswith(("action_head.", "proprio_projector."))} == wanted.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    half = load(save_oft(tmp_path / "half", dtype=torch.bfloat16)).state_dict()
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in wanted.items())
    empty = FAMILY.build(source).state_dict()
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in empty.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in state.items()
    }
    assert all(tensor.is_meta for tensor in empty.values())


def test_a_directory_of_our_class_needs_no_side_heads(policy: OpenVLAForActionPrediction, tmp_path: Path) -> None:
    policy.save_pretrained(tmp_path)
    assert policy.processor is not None
    policy.processor.save_pretrained(tmp_path)
    again = load(tmp_path)
    wanted = policy.predict_action(IMAGES, "push", state=SAMPLE.state)
    assert np.array_equal(again.predict_action(IMAGES, "push", state=SAMPLE.state), wanted)


def test_the_statistics_of_the_fine_tuning_replace_those_of_the_base(copied: Path) -> None:
    config = json.loads((copied / "config.json").read_text(encoding="utf-8"))
    assert list(config["norm_stats"]) == ["tiny"]
    assert list(load(copied).config.norm_stats) == ["kitchen"]
    (copied / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match=r"'tiny' lack proprio\.q01.*dataset_statistics\.json"):
        load(copied).predict_action(IMAGES, "push", state=SAMPLE.state)


def _append(name: str, tensors: Any) -> Callable[[Path], Any]:
    return lambda directory: torch.save(tensors, directory / name)


def _says(**said: Any) -> Callable[[Path], Any]:
    return _write("oft.json", json.dumps(said))


def _changed_head(**changes: Any) -> Callable[[Path], Any]:
    return _append(HEAD_FILE, heads()[HEAD_FILE] | changes)


def _write(name: str, text: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(text, encoding="utf-8")


class Surprise:
    """Not a tensor."""


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing said": (lambda d: (d / "oft.json").unlink(), r"does not say action_chunk and num_images_in_input.*LIBERO"),
    "half said": (_says(action_chunk=3), r"does not say num_images_in_input, which"),
    "zero said": (_says(action_chunk=0, num_images_in_input=2), "action_chunk=0; wanted a number from 1 up"),
    "unknown said": (_says(chunks=3), r"oft.json: holds chunks; wanted an object with action_chunk"),
    "no json": (_write("oft.json", "{"), r"oft.json: not valid JSON"),
    "film": (_append("vision_backbone--9_checkpoint.pt", {}), r"vision_backbone--9.*conditioned on the instruction"),
    "diffusion": (_append("noisy_action_projector--9_checkpoint.pt", {}), "denoised by diffusion"),
    "noise": (_append(HEAD_FILE, {"module.noise_predictor.x": torch.ones(1)}), "denoised by diffusion"),
    "two heads": (_append("action_head--9_checkpoint.pt", {}), r"2 files of one kind .*action_head--150.*keep the one"),
    "no head": (lambda d: (d / HEAD_FILE).unlink(), r"proprio_projector--150.*without action_head--\*\.pt"),
    "shape": (_changed_head(**{"model.fc1.weight": torch.ones(64, 9)}), r"fc1\.weight has shape \(64, 9\), wanted"),
    "missing": (_append(PROPRIO_FILE, {"fc1.weight": torch.ones(64, 5)}), r"fc1\.bias has shape none, wanted \(64,\)"),
    "surplus": (_changed_head(extra=torch.ones(1)), r"extra has shape \(1,\), wanted no such tensor"),
    "nan": (_changed_head(**{"model.fc2.bias": torch.full((ACTION,), torch.nan)}), r"model\.fc2\.bias holds values"),
    "object": (_append(HEAD_FILE, {"x": Surprise()}), "cannot be read as tensors and nothing else"),
    "list": (_append(HEAD_FILE, [1]), "holds list, wanted tensors by name"),
    "garbage": (_write(HEAD_FILE, "garbage"), "cannot be read as tensors and nothing else"),
    "flat": (_write("dataset_statistics.json", '{"action": {"q01": []}}'), "action has no `action`; wanted"),
    "truncated": (_write("dataset_statistics.json", "{"), "dataset_statistics.json: not valid JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_directory_that_cannot_be_run_is_refused(copied: Path, fault: str) -> None:
    harm, message = FAULTS[fault]
    harm(copied)
    with pytest.raises(CheckpointError, match=message):
        vlaquant.load(copied)


def test_what_does_not_fit_the_policy_is_refused(policy: OpenVLAForActionPrediction) -> None:
    with pytest.raises(CheckpointError, match="1 images for a policy with 2 cameras"):
        policy.predict_action(IMAGES[:1], "push", state=SAMPLE.state)
    with pytest.raises(CheckpointError, match="state as 5 numbers, got none"):
        policy.predict_action(IMAGES, "push")
    with pytest.raises(CheckpointError, match=r"state as 5 numbers, got shape \[4\]"):
        policy.predict_action(IMAGES, "push", state=np.zeros(4))
    with pytest.raises(CheckpointError, match="come from a head and not from tokens"):
        policy.predict_tokens(*policy.encode(IMAGES, "push"), count=4)
    with pytest.raises(CheckpointError, match="needs the robot's state"):
        policy.regress(*policy.encode(IMAGES, "push"))
    with pytest.raises(CalibrationError, match=r"1 images, and this policy has 2 cameras; say which.*`cameras:`"):
        FAMILY.inputs(policy, replace(SAMPLE, images=SAMPLE.images[:1]))
    with pytest.raises(CalibrationError, match="no image of camera 2, and this policy needs all of its 2"):
        FAMILY.inputs(policy, replace(SAMPLE, images=(SAMPLE.images[0], None)))
    policy.config.norm_stats["kitchen"]["action"] |= {"q01": [0.0], "q99": [1.0], "mask": [True]}
    with pytest.raises(CheckpointError, match="actions with 1 numbers, and the action head makes 4"):
        policy.predict_action(IMAGES, "push", state=SAMPLE.state)


def test_a_camera_that_does_not_reach_the_action_is_noticed(policy: OpenVLAForActionPrediction) -> None:
    inputs = FAMILY.inputs(policy, SAMPLE)
    FAMILY.check(policy, inputs)
    FAMILY.check(policy, FAMILY.example(policy))
    kept = policy.image_tokens // 2
    policy.vision_backbone.register_forward_hook(
        lambda _module, _args, patches: torch.cat([patches[:, :kept], torch.zeros_like(patches[:, kept:])], dim=1)
    )
    with pytest.raises(CalibrationError, match="different images of camera 2 give the same outputs"):
        FAMILY.check(policy, inputs)
