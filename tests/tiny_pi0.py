"""A tiny π0 of transformers' own class, its directory under several sets of names, and observations for it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import tokenizer
from transformers import PI0Config, PI0ForConditionalGeneration
from transformers.models.pi0.processing_pi0 import PI0Processor

from vlaquant.families.observation import Observation
from vlaquant.families.pi0 import _ImageProcessor

IMAGE_SIZE = 28
STATE, ACTION, PADDED, CHUNK, STEPS = 5, 4, 8, 6, 3


def processor() -> PI0Processor:
    """Four patches an image; statistics for ``STATE`` and ``ACTION`` numbers, which are padded to ``PADDED``."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = _ImageProcessor(
        size={"max_height": IMAGE_SIZE, "max_width": IMAGE_SIZE}, pad_size=size, image_seq_length=4
    )
    return PI0Processor(
        images,
        tokenizer(),
        state_mean=[0.1] * STATE,
        state_std=[0.5] * STATE,
        actions_mean=[0.2, -0.3, 0.0, 0.1],
        actions_std=[0.5, 1.5, 1.0, 2.0],
        max_state_dim=PADDED,
        chunk_size=CHUNK,
    )


def pi0(*, dtype: torch.dtype = torch.float32, seed: int = 0, values: int = 1) -> PI0ForConditionalGeneration:
    """Two layers everywhere, width 64, two heads of 32 that share ``values`` value heads; three denoising steps."""
    torch.manual_seed(seed)
    ready = processor()
    gemma = {
        "model_type": "gemma",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": values,
        "head_dim": 32,
        "vocab_size": len(ready.tokenizer),
        "pad_token_id": 3,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 14,
        "image_size": IMAGE_SIZE,
        "vision_use_head": False,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "text_config": gemma,
            "vision_config": vision,
            "projection_dim": 64,
            "hidden_size": 64,
            "image_token_id": ready.image_token_id,
        },
        dit_config=gemma,
        chunk_size=CHUNK,
        max_state_dim=PADDED,
        max_action_dim=PADDED,
        num_inference_steps=STEPS,
    )
    model: Any = PI0ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As made, norms and biases do nothing, and the image hardly moves the action
            if parameter.ndim == 1:
                parameter.normal_(std=0.2)
            elif "embed" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.to(dtype).eval()
    model.processor = ready
    return model


def save_pi0(directory: Path, model: PI0ForConditionalGeneration, names: str = "saved") -> Path:
    """Write the policy with its processor.

    Args:
        directory: to make.
        model: the policy.
        names: ``saved``, as ``save_pretrained`` has them; ``live``; or ``hub``, as LeRobot's checkpoints have them.
    """
    wrapped: Any = model
    wrapped.save_pretrained(directory)
    wrapped.processor.save_pretrained(directory)
    file = directory / "model.safetensors"
    if names == "live":
        save_file({name: tensor.contiguous() for name, tensor in wrapped.state_dict().items()}, file, {"format": "pt"})
    if names == "hub":
        save_file(hub_tensors(wrapped), file, {"format": "pt"})
    return directory


def hub_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The policy's tensors as LeRobot has them: the prompt's embedding twice, the expert's as a head of its own."""
    policy = "model.paligemma_with_expert."
    places = {
        "model.vlm.vision_tower.": f"{policy}paligemma.model.vision_tower.vision_model.",
        "model.vlm.": f"{policy}paligemma.model.",
        "model.dit.embed_tokens.": f"{policy}gemma_expert.lm_head.",
        "model.dit.": f"{policy}gemma_expert.model.",
        "embed_action_time.": "model.",
        "": "model.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        live = next(place for place in places if name.startswith(place))
        tensors[places[live] + name.removeprefix(live)] = tensor.contiguous()
    embedding = tensors[f"{policy}paligemma.model.language_model.embed_tokens.weight"]
    return tensors | {f"{policy}paligemma.lm_head.weight": embedding.clone()}


def without_dtype(directory: Path) -> Path:
    """Forget in ``config.json`` which dtype the weights have."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("dtype", None)
    path.write_text(json.dumps(config), encoding="utf-8")
    return directory


def robot_observations(count: int = 4, seed: int = 0, cameras: int = 2) -> list[Observation]:
    """Random images, states and chunks of actions."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            images=tuple(Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(cameras)),
            instruction="push the robot",
            state=rng.uniform(-1.0, 1.0, STATE),
            action=rng.uniform(-1.0, 1.0, (CHUNK, ACTION)),
            episode=index,
            task="push",
        )
        for index in range(count)
    ]
