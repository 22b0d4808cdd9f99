"""One observation → the tensors that a LeRobot policy takes, through the directory's own processor pipelines."""

import json
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Inputs
from vlaquant.families.observation import Observation

STATE, ACTION = "observation.state", "action"
TOKENS, TOKEN_MASK = "observation.language.tokens", "observation.language.attention_mask"
NOISE, TIME = "noise", "time"
_PRE, _POST = "policy_preprocessor.json", "policy_postprocessor.json"


class Processors:
    """The pre- and post-processor of a directory, read when they are first needed.

    Loading a policy does not need them, nor the tokenizer that LeRobot would look for on the hub.
    """

    def __init__(self, directory: Path, config: Any) -> None:
        self._directory = directory
        self._config = config

    @property
    def present(self) -> bool:
        """Whether the directory has both."""
        return all((self._directory / name).is_file() for name in (_PRE, _POST))

    def before(self, frame: dict[str, Any]) -> dict[str, Any]:
        """What a robot or a data set gives → a batch for the policy: normalized, tokenized, with a batch dimension."""
        batch: dict[str, Any] = self._pair[0](frame)
        return batch

    def after(self, action: Tensor) -> Tensor:
        """The policy's action → in the units of the robot."""
        unnormalized: Tensor = self._pair[1](action)
        return unnormalized

    @cached_property
    def _pair(self) -> tuple[Any, Any]:
        from lerobot.policies.factory import make_pre_post_processors

        if not self.present:
            raise CalibrationError(
                f"{self._directory}: lacks {_PRE} or {_POST}, so observations cannot be turned into inputs; save the "
                "policy's processors into it, or give batches that went through them"
            )
        try:
            pair: tuple[Any, Any] = make_pre_post_processors(
                self._config,
                pretrained_path=str(self._directory),
                preprocessor_overrides=self._overrides(_PRE),
                postprocessor_overrides=self._overrides(_POST),
            )
        except OSError as error:
            raise CalibrationError(
                f"{self._directory}: {_PRE} wants something that is not on this machine, likely its tokenizer "
                f"({error}). Connect once, or copy it into a folder of {self._directory} and name that folder as "
                "tokenizer_name"
            ) from error
        return pair

    def _overrides(self, name: str) -> dict[str, dict[str, Any]]:
        """Everything runs on the CPU, where inputs are drawn; a tokenizer may lie in the directory itself."""
        steps = json.loads((self._directory / name).read_text(encoding="utf-8"))["steps"]
        changed: dict[str, dict[str, Any]] = {}
        for step in steps:
            kind, config = step.get("registry_name"), step.get("config", {})
            if kind == "device_processor":
                changed[kind] = {"device": "cpu"}
            elif kind == "tokenizer_processor" and isinstance(config.get("tokenizer_name"), str):
                local = self._directory / config["tokenizer_name"]
                changed[kind] = {"tokenizer_name": str(local)} if local.is_dir() else {}
        return changed


def cameras(config: Any) -> list[str]:
    """Names of the policy's image inputs, in their order, without cameras that exist only to be empty."""
    return [name for name in config.image_features if ".empty_camera_" not in name]


def inputs_of(policy: Any, sample: Any) -> Inputs:
    """Images, tokens, state, demonstrated action, noise and time.

    A chunk that is shorter than the policy's goes on with its last action, as the ends of recorded episodes do.

    Args:
        policy: has ``processors`` if it came from a directory.
        sample: an :class:`Observation`, or a batch that went through the policy's own preprocessor.

    Raises:
        CalibrationError: no camera has an image, or something that the policy needs was not recorded.
    """
    if isinstance(sample, Mapping):
        batch = dict(sample)
    else:
        processors = getattr(policy, "processors", None)
        if processors is None:
            raise CalibrationError(
                f"this {type(policy).__name__} came from memory, without its processors; give batches that went "
                "through its preprocessor, or quantize its directory"
            )
        batch = processors.before(_frame(policy.config, sample))
    return complete(policy, batch, _content(batch))


def _frame(config: Any, sample: Observation) -> dict[str, Any]:
    """The observation as LeRobot's data sets have it."""
    where = f"episode {sample.episode}, {sample.instruction!r}"
    names = cameras(config)
    if len(sample.images) > len(names):
        raise CalibrationError(f"{where}: {len(sample.images)} images, and the policy has the cameras {names}")
    frame: dict[str, Any] = {
        name: torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous() / 255
        for name, image in zip(names, sample.images, strict=False)
        if image is not None
    }
    if not frame:
        raise CalibrationError(f"{where}: no camera has an image; take this observation out of the data")
    if sample.state is None and STATE in config.input_features:
        raise CalibrationError(f"{where}: the robot's state was not recorded, and this policy needs it")
    if sample.state is not None:
        frame[STATE] = torch.from_numpy(np.asarray(sample.state, dtype=np.float32))
    if sample.action is not None:
        action = np.atleast_2d(np.asarray(sample.action, dtype=np.float32))[: config.chunk_size]
        wanted = config.output_features[ACTION].shape[0]
        if action.shape[1] != wanted:
            raise CalibrationError(f"{where}: the action has {action.shape[1]} numbers, the policy's has {wanted}")
        filled = np.concatenate([action, np.repeat(action[-1:], config.chunk_size - len(action), axis=0)])
        frame[ACTION] = torch.from_numpy(filled).unsqueeze(0)
    return frame | {"task": sample.instruction}


def _content(batch: Mapping[str, Any]) -> int:
    """A checksum of what the policy would see."""
    seed = 0
    for name in sorted(name for name, value in batch.items() if isinstance(value, Tensor)):
        tensor = batch[name].detach().cpu().contiguous()
        seed = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), zlib.crc32(name.encode(), seed))
    return seed


def complete(policy: Any, batch: Mapping[str, Any], seed: int) -> Inputs:
    """What of ``batch`` the policy reads, on its device, with noise and time drawn as in training.

    Raises:
        CalibrationError: no image, or no tokens.
    """
    config = policy.config
    seen = [name for name in config.image_features if name in batch]
    if not seen:
        raise CalibrationError(
            f"no camera has an image: the policy's are {', '.join(config.image_features)}, and the batch has "
            f"{', '.join(batch)}"
        )
    if TOKENS not in batch:
        raise CalibrationError(f"the batch has no {TOKENS}: it did not go through the policy's preprocessor")
    masks = [f"{name}_padding_mask" for name in seen]
    names = [*seen, *masks, TOKENS, TOKEN_MASK, STATE, ACTION]
    inputs = {name: batch[name] for name in names if isinstance(batch.get(name), Tensor)}
    count = len(batch[TOKENS])
    noise = torch.randn(
        (count, config.chunk_size, config.max_action_dim), generator=torch.Generator().manual_seed(seed)
    )
    alpha, beta = getattr(config, "time_sampling_beta_alpha", 1.5), getattr(config, "time_sampling_beta_beta", 1.0)
    drawn = torch.from_numpy(np.random.default_rng(seed).beta(alpha, beta, count)).float()
    time = drawn * getattr(config, "time_sampling_scale", 0.999) + getattr(config, "time_sampling_offset", 0.001)
    device = next(policy.parameters()).device
    return {name: tensor.to(device) for name, tensor in (inputs | {NOISE: noise, TIME: time}).items()}
