import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

CLASSES = {"smolvla": ("smolvla", "SmolVLAPolicy"), "pi05": ("pi05", "PI05Policy")}


def get_policy_class(name: str) -> Any:
    module, policy = CLASSES[name]
    return getattr(importlib.import_module(f"lerobot.policies.{module}"), policy)


def make_pre_post_processors(
    config: Any, pretrained_path: str, preprocessor_overrides: Any, postprocessor_overrides: Any
) -> tuple[Callable[[dict[str, Any]], dict[str, Any]], Callable[[Tensor], Tensor]]:
    """Normalize, tokenize and add a batch dimension; and back."""
    steps = json.loads(Path(pretrained_path, "policy_preprocessor.json").read_text(encoding="utf-8"))["steps"]
    settings = {step["registry_name"]: step.get("config", {}) for step in steps}
    for name, values in preprocessor_overrides.items():
        settings[name] |= values
    if {"cpu"} != {settings["device_processor"]["device"], postprocessor_overrides["device_processor"]["device"]}:
        raise ValueError("Torch not compiled with CUDA enabled")
    tokenizer = AutoTokenizer.from_pretrained(settings["tokenizer_processor"]["tokenizer_name"])
    stats = load_file(Path(pretrained_path, "stats.safetensors"))

    def before(frame: dict[str, Any]) -> dict[str, Any]:
        words = tokenizer(frame.pop("task"), padding="max_length", max_length=12, return_tensors="pt")
        batch = {name: value if name == "action" else value.unsqueeze(0) for name, value in frame.items()}
        for name in {"observation.state", "action"} & batch.keys():
            batch[name] = (batch[name] - stats[f"{name}.mean"]) / stats[f"{name}.std"]
        tokens, real = words["input_ids"], words["attention_mask"].to(torch.bool)
        return batch | {"observation.language.tokens": tokens, "observation.language.attention_mask": real}

    return before, lambda action: action * stats["action.std"] + stats["action.mean"]
