"""Tiny directories as LeRobot saves them, of its real classes; needs LeRobot. Nothing comes from the hub.

SmolVLA takes its sizes from the backbone's config. The sizes of π0 and π0.5 are constants in LeRobot, which
:func:`tiny_pi` makes smaller while a policy is being built; the family ``tiny_lerobot`` does that in any process.
"""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from tiny import tokenizer
from tokenizers import AddedToken
from torch import nn

from vlaquant.families import FAMILIES, register_family
from vlaquant.families.lerobot import LEROBOT
from vlaquant.families.observation import Observation

STATE, ACTION, CHUNK = 6, 4, 8
CAMERAS = ("observation.images.top", "observation.images.wrist")
_IMAGE_TOKENS = {"image_token": "<image>", "fake_image_token": "<fake>", "global_image_token": "<global>"}


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
    """A policy of ``kind`` (smolvla, pi0, pi05) with random weights, saved by LeRobot, with its processors."""
    policy = made(directory, kind, **changes)
    policy.save_pretrained(directory)
    save_processors(directory, policy.config)
    return directory


def made(directory: Path, kind: str, **changes: Any) -> Any:
    """The policy itself, with norms unlike new ones; ``directory`` gets what it would take from the hub."""
    torch.manual_seed(0)
    directory.mkdir(parents=True, exist_ok=True)
    if kind == "smolvla":
        changes = {"vlm_model_name": save_backbone(directory / "backbone")} | changes
    factory = importlib.import_module("lerobot.policies.factory")
    with tiny_pi():
        policy = factory.get_policy_class(kind)(_config(kind, **changes))
    # As large as in trained policies: with those of a new one, the action is hardly more than the noise it began with
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
        elif parameter.ndim == 2:
            parameter.data = torch.randn_like(parameter) * parameter.shape[1] ** -0.5
    return policy.eval()


def _config(kind: str, **changes: Any) -> Any:
    types = importlib.import_module("lerobot.configs.types")
    image = types.PolicyFeature(types.FeatureType.VISUAL, (3, 40, 56))
    values: dict[str, Any] = {
        "device": "cpu",
        "chunk_size": CHUNK,
        "n_action_steps": CHUNK,
        "max_state_dim": 8,
        "max_action_dim": 8,
        "tokenizer_max_length": 12,
        "input_features": {
            **dict.fromkeys(CAMERAS, image),
            "observation.state": types.PolicyFeature(types.FeatureType.STATE, (STATE,)),
        },
        "output_features": {"action": types.PolicyFeature(types.FeatureType.ACTION, (ACTION,))},
    }
    if kind == "smolvla":
        values |= {"num_vlm_layers": 4, "num_steps": 3, "resize_imgs_with_padding": (64, 64), "empty_cameras": 1}
        values |= {"pad_language_to": "max_length", "load_vlm_weights": False}
    else:
        values |= {"num_inference_steps": 3, "image_resolution": (56, 56)}
    return importlib.import_module("lerobot.policies.factory").make_policy_config(kind, **(values | changes))


def save_backbone(directory: Path) -> str:
    """Config and processor of a SmolVLM with width 96 and grouped-query attention."""
    transformers: Any = importlib.import_module("transformers")
    inner = tokenizer().backend_tokenizer
    inner.add_special_tokens([AddedToken(token, special=True) for token in _IMAGE_TOKENS.values()])
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        extra_special_tokens=_IMAGE_TOKENS,
    )
    config = transformers.SmolVLMConfig(
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 64,
            "patch_size": 16,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 512,
            "hidden_size": 96,
            "intermediate_size": 128,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pad_token_id": 0,
        },
    )
    config.save_pretrained(directory)
    images, videos = transformers.SmolVLMImageProcessor(), transformers.SmolVLMVideoProcessor()
    transformers.SmolVLMProcessor(images, words, videos, chat_template="{{ messages }}").save_pretrained(directory)
    return str(directory)


def save_processors(directory: Path, config: Any) -> None:
    """LeRobot's own pipelines for the policy, with a tokenizer that lies in the directory."""
    factory = importlib.import_module("lerobot.policies.factory")
    tokenizing = importlib.import_module("lerobot.processor.tokenizer_processor")
    draw = torch.Generator().manual_seed(0)
    stats = {
        name: {"mean": torch.rand(size, generator=draw), "std": 1 + torch.rand(size, generator=draw)}
        | {"q01": -1.5 - torch.rand(size, generator=draw), "q99": 1.5 + torch.rand(size, generator=draw)}
        for name, size in (("observation.state", STATE), ("action", ACTION))
    }
    tokenizer().save_pretrained(directory / "tokenizer")
    with patch.object(tokenizing.AutoTokenizer, "from_pretrained", lambda *args, **more: tokenizer()):
        before, after = factory.make_pre_post_processors(config, dataset_stats=stats)
    before.save_pretrained(directory, config_filename="policy_preprocessor.json")
    after.save_pretrained(directory, config_filename="policy_postprocessor.json")
    path = directory / "policy_preprocessor.json"
    pipeline = json.loads(path.read_text(encoding="utf-8"))
    for step in pipeline["steps"]:
        if step.get("registry_name") == "tokenizer_processor":
            step["config"]["tokenizer_name"] = "tokenizer"
    path.write_text(json.dumps(pipeline, indent=2), encoding="utf-8")


@contextmanager
def tiny_pi() -> Iterator[None]:
    """Inside, π0 and π0.5 have width 64, 3 layers, a vision tower of 2 and 512 words."""
    with ExitStack() as stack:
        for kind in ("pi0", "pi05"):
            module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
            stack.enter_context(patch.multiple(module, **_shrunk(module)))
        yield


def _shrunk(module: Any) -> dict[str, Any]:
    mapping, backbone = module.CONFIG_MAPPING, module.PaliGemmaForConditionalGenerationWithPiGemma

    def sizes(_variant: str) -> Any:
        # 8 heads are a constant of the joint pass
        return module.GemmaConfig(width=64, depth=3, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16)

    def small_backbone(config: Any) -> nn.Module:
        config.text_config.vocab_size = 512
        config.image_token_id = 511
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers = 64, 128, 2
        vision.num_attention_heads, vision.patch_size, vision.projection_dim = 4, 14, 64
        config.projection_dim = 64
        return backbone(config=config)

    def small_expert(**values: Any) -> Any:
        return mapping["gemma"](**(values | {"vocab_size": 512}))

    return {
        "get_gemma_config": sizes,
        "PaliGemmaForConditionalGenerationWithPiGemma": small_backbone,
        "CONFIG_MAPPING": {"paligemma": mapping["paligemma"], "gemma": small_expert},
    }


def _load(directory: Path) -> nn.Module:
    with tiny_pi():
        return LEROBOT.load(directory)


def _build(directory: Path) -> nn.Module:
    with tiny_pi():
        return LEROBOT.build(directory)


TINY = dataclasses.replace(LEROBOT, name="tiny_lerobot", load=_load, build=_build)
if TINY.name not in FAMILIES:
    register_family(TINY)
