"""Tiny directories of policies that look like LeRobot's, for where LeRobot is not installed.

``tests/lookalikes`` comes before everything else on the path, so that this and every fresh process take its package
``lerobot`` for the real one.
"""

import json
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tokenizer

from vlaquant.families.observation import Observation

_HERE = str(Path(__file__).resolve().parent / "lookalikes")
if any(distributions(name="lerobot")):
    pytest.skip("LeRobot is installed: `make test-lerobot` tests the real one", allow_module_level=True)
if _HERE not in sys.path:
    sys.path.insert(0, _HERE)

STATE, ACTION, CHUNK = 6, 4, 8
CAMERAS = ("observation.images.top", "observation.images.wrist")


def observations(count: int = 4, seed: int = 0, *, wrist: bool = True) -> list[Observation]:
    """Random images, states and chunks of actions; without ``wrist`` the second camera is missing."""
    rng = np.random.default_rng(seed)

    def image() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))

    return [
        Observation(
            images=(image(), image() if wrist else None),
            instruction="push the robot",
            state=rng.uniform(-1.0, 1.0, STATE),
            action=rng.uniform(-1.0, 1.0, (CHUNK, ACTION)),
            episode=index,
            task="push",
        )
        for index in range(count)
    ]


def save(directory: Path, kind: str, **changes: Any) -> Path:
    """A policy of ``kind`` (smolvla, pi05) with random weights, as LeRobot would save it."""
    directory.mkdir(parents=True, exist_ok=True)
    image = {"type": "VISUAL", "shape": [3, 40, 56]}
    config = {
        "type": kind,
        "input_features": {
            **dict.fromkeys(CAMERAS, image),
            "observation.state": {"type": "STATE", "shape": [STATE]},
        },
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION]}},
        "device": "cuda",
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "num_steps": 3,
        "compile_model": False,
        "compile_mode": "max-autotune",
    }
    special = {"attention_mode": "cross_attn", "self_attn_every_n_layers": 2, "vlm_model_name": "backbone"}
    config |= (special if kind == "smolvla" else {"dtype": "float32"}) | changes
    (directory / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
    policy = made(directory)
    first = {id(tensor): name for name, tensor in reversed(policy.state_dict(keep_vars=True).items())}
    tensors = policy.state_dict()
    save_file({name: tensors[name].contiguous() for name in first.values()}, directory / "model.safetensors")
    _save_processors(directory)
    return directory


def made(directory: Path) -> Any:
    """The policy of a config, with random weights; norms and modulations are not as initialized."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    config = PreTrainedConfig.from_pretrained(str(directory))
    config.device = "cpu"
    torch.manual_seed(0)
    policy = get_policy_class(config.type)(config)
    # As large as in trained policies: with those of a new one, the action is hardly more than the noise it began with
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
    return policy.eval()


def _save_processors(directory: Path) -> None:
    tokenizer().save_pretrained(directory / "tokenizer")
    device = {"registry_name": "device_processor", "config": {"device": "cuda"}}
    words = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "tokenizer"}}
    for name, steps in (("policy_preprocessor", [words, device]), ("policy_postprocessor", [device])):
        (directory / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}), encoding="utf-8")
    draw = torch.Generator().manual_seed(0)
    stats = {
        f"{name}.{kind}": base + torch.rand(size, generator=draw)
        for name, size in (("observation.state", STATE), ("action", ACTION))
        for kind, base in (("mean", 0.0), ("std", 1.0))
    }
    save_file(stats, directory / "stats.safetensors")
