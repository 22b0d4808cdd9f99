"""Policies at the sizes in which they are published, without weights: what plans are made for.

OpenVLA, OpenVLA-OFT and π0 are the real classes. π0.5 and SmolVLA are trees with LeRobot's names and shapes, and GR00T
is the look-alike of the tests; they hold every parameter of the originals, and the first two cannot run. The sizes of
SmolVLM2-500M and Cosmos-Reason2-2B were not read from their own files.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from make_synthetic_checkpoint import make_config
from torch import nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaModel,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PI0Config,
    PI0ForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from vlaquant.families.base import empty_weights
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction

_ACTION = 32  # of π and SmolVLA, padded


def openvla() -> nn.Module:
    return OpenVLAForActionPrediction(make_config())


def openvla_oft() -> nn.Module:
    """Two cameras, the robot's state, and the regression head: 8 actions of 7 numbers in one pass."""
    actions = {"action_decoding": "regression", "action_chunk": 8, "action_dim": 7}
    seen = {"num_images_in_input": 2, "proprio_dim": 8}
    return OpenVLAForActionPrediction(OpenVLAConfig(**(make_config().to_dict() | actions | seen)))


def pi0() -> nn.Module:
    return PI0ForConditionalGeneration(PI0Config())


class _LeRobotPolicy(nn.Module):
    """What vlaquant knows a policy of LeRobot by."""

    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.config = SimpleNamespace(type=name)
        self.model = model

    def predict_action_chunk(self, *_: object) -> None:
        raise NotImplementedError("a tree of shapes cannot act")


class PI05Policy(_LeRobotPolicy):
    name = "pi05"

    def __init__(self) -> None:
        published: Any = PI0Config()
        vlm, width = published.vlm_config.to_dict(), 1024
        both: Any = nn.Module()
        both.paligemma = PaliGemmaForConditionalGeneration(PaliGemmaConfig(**vlm))
        expert = GemmaConfig(**(published.dit_config.to_dict() | {"tie_word_embeddings": False}))
        both.gemma_expert = GemmaForCausalLM(expert)
        both.gemma_expert.model.embed_tokens = None
        for layer in both.gemma_expert.model.layers:
            layer.input_layernorm, layer.post_attention_layernorm = _modulated(width), _modulated(width)
        both.gemma_expert.model.norm = _modulated(width)
        model: Any = nn.Module()
        model.paligemma_with_expert = both
        model.action_in_proj, model.action_out_proj = nn.Linear(_ACTION, width), nn.Linear(width, _ACTION)
        model.time_mlp_in, model.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)
        super().__init__("pi05", model)


def _modulated(width: int) -> Any:
    """A norm whose scale, shift and gate come from the time."""
    norm: Any = nn.Module()
    norm.dense = nn.Linear(width, 3 * width)
    return norm


class SmolVLAPolicy(_LeRobotPolicy):
    name = "smolvla"

    def __init__(self) -> None:
        heads: dict[str, Any] = {
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "num_hidden_layers": 16,
        }
        text = heads | {"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "vocab_size": 49280}
        vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        both: Any = nn.Module()
        both.vlm = SmolVLMForConditionalGeneration(
            SmolVLMConfig(
                text_config=text,
                vision_config=vision | {"image_size": 512, "patch_size": 16},
                scale_factor=4,
                tie_word_embeddings=False,
            )
        )
        width, inner = 720, 2048
        both.lm_expert = LlamaModel(LlamaConfig(**(text | {"hidden_size": width, "intermediate_size": inner})))
        both.lm_expert.embed_tokens = None
        for layer in both.lm_expert.layers[1::2]:
            layer.self_attn.k_proj, layer.self_attn.v_proj = (nn.Linear(320, 320, bias=False) for _ in "kv")
        both.num_vlm_layers = both.num_expert_layers = 16
        model: Any = nn.Module()
        model.vlm_with_expert = both
        model.state_proj = nn.Linear(_ACTION, 960)
        model.action_in_proj, model.action_out_proj = nn.Linear(_ACTION, width), nn.Linear(width, _ACTION)
        model.action_time_mlp_in, model.action_time_mlp_out = nn.Linear(2 * width, width), nn.Linear(width, width)
        super().__init__("smolvla", model)


def groot() -> nn.Module:
    """N1.7: 16 layers of a Qwen3-VL of 2B, 32 blocks that denoise, 32 robots."""
    tests = str(Path(__file__).resolve().parent.parent / "tests")
    sys.path.insert(0, tests)
    try:
        theirs: Any = importlib.import_module("lookalikes.groot")
    finally:
        sys.path.remove(tests)
    text = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    vision = {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    }
    backbone = {"text_config": text, "vision_config": vision, "tie_word_embeddings": True}
    model: nn.Module = theirs.Gr00tN1d7(theirs.Gr00tN1d7Config(backbone_config=backbone))
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "OpenVLA-7B": openvla,
    "OpenVLA-OFT": openvla_oft,
    "π0": pi0,
    "π0.5": PI05Policy,
    "SmolVLA": SmolVLAPolicy,
    "GR00T N1.7": groot,
}


def build(name: str) -> nn.Module:
    """The model called ``name``, in bfloat16, on the meta device."""
    with empty_weights(torch.bfloat16):
        model = MODELS[name]()
    for module in model.modules():
        tie = getattr(module, "tie_weights", None)
        if callable(tie):
            tie()  # parameters that moved to the meta device came apart
    return model.eval()
