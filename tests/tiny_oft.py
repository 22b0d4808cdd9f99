"""A tiny OpenVLA-OFT policy as its training leaves it: OpenVLA's directory, and heads beside it as pickles."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import ACTION, openvla, save_openvla
from torch import Tensor

from vlaquant.families.observation import Observation
from vlaquant.models.openvla.regression import ActionHead, ProprioProjector

CHUNK, CAMERAS, STATE, WIDTH = 3, 2, 5, 64
STATISTICS = {
    "kitchen": {
        "action": {
            "q01": [-1.0, -2.0, 0.0, 0.0],
            "q99": [1.0, 2.0, 0.5, 1.0],
            "min": [-3.0, -3.0, -3.0, 0.0],
            "max": [3.0, 3.0, 3.0, 1.0],
            "mask": [True, True, True, False],
        },
        "proprio": {"q01": [-1.0] * STATE, "q99": [3.0] * STATE, "min": [-4.0] * STATE, "max": [4.0] * STATE},
    }
}
HEAD_FILE, PROPRIO_FILE = "action_head--150_checkpoint.pt", "proprio_projector--150_checkpoint.pt"


def save_oft(
    directory: Path,
    *,
    said: dict[str, Any] | None = None,
    proprio: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write the directory; ``said`` is the content of ``oft.json``, which {} leaves out."""
    save_openvla(directory, openvla(parallel=False, dtype=dtype, seed=seed))
    (directory / "dataset_statistics.json").write_text(json.dumps(STATISTICS), encoding="utf-8")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    # What no published file says
    for field in ("action_chunk", "action_decoding", "num_images_in_input"):
        config.pop(field, None)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file, tensors in heads(proprio=proprio, seed=seed).items():
        torch.save({f"module.{name}": tensor for name, tensor in tensors.items()}, directory / file)
    said = {"action_chunk": CHUNK, "num_images_in_input": CAMERAS} if said is None else said
    if said:
        (directory / "oft.json").write_text(json.dumps(said), encoding="utf-8")
    return directory


def heads(*, proprio: bool = True, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors, float32 as data-parallel training without autocast leaves them."""
    torch.manual_seed(seed)
    modules = {HEAD_FILE: ActionHead(WIDTH, ACTION, 2)} | (
        {PROPRIO_FILE: ProprioProjector(STATE, WIDTH)} if proprio else {}
    )
    return {file: module.state_dict() for file, module in modules.items()}


def oft_observations(count: int = 4, seed: int = 0) -> list[Observation]:
    """Random images of two cameras, states and chunks."""
    rng = np.random.default_rng(seed)

    def image() -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))

    return [
        Observation(
            images=tuple(image() for _ in range(CAMERAS)),
            instruction="push",
            state=rng.uniform(-2.0, 4.0, STATE),
            action=rng.uniform(-1.0, 1.0, (CHUNK, ACTION)),
            episode=index,
            task="push",
            unnorm_key="kitchen",
        )
        for index in range(count)
    ]


def images_of(observation: Observation) -> list[Image.Image]:
    """What all cameras saw."""
    return [image for image in observation.images if image is not None]
