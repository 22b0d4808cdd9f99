"""Tiny image-text-to-text models of transformers, as directories with a tokenizer and an image processor."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

#: Images are made 56 pixels wide, of 4 × 4 patches.
SIZE, PATCH = 56, 14
_SPECIAL = [
    "<image>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
]
_WORDS = ["<unk>", "<s>", "</s>", "<PAD>", "push", "the", "button", "do", "something", *_SPECIAL]
_TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_QWEN_TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
_IMAGE = _WORDS.index("<image>")
_QWEN = {"image_token_id": _IMAGE, "video_token_id": _IMAGE + 1, "vision_start_token_id": _IMAGE + 2}

#: Model type -> what its config is made of.
KINDS: dict[str, dict[str, Any]] = {
    "llava": {
        "vision_config": _TOWER | {"model_type": "clip_vision_model"},
        "text_config": _TEXT | {"model_type": "llama"},
        "image_token_id": _IMAGE,
        "image_token_index": _IMAGE,
    },
    "paligemma": {
        "vision_config": _TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "text_config": _TEXT | {"model_type": "gemma"},
        "image_token_id": _IMAGE,
        "image_token_index": _IMAGE,
        "projection_dim": 64,
    },
    "qwen2_5_vl": {
        "vision_config": _QWEN_TOWER | {"depth": 2, "window_size": 56, "fullatt_block_indexes": [1]},
        "text_config": _TEXT | {"rope_parameters": _MROPE},
        **_QWEN,
    },
    "qwen3_vl": {
        "vision_config": _QWEN_TOWER | {"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        "text_config": _TEXT | {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        **_QWEN,
    },
    "idefics3": {
        "vision_config": _TOWER,
        "text_config": _TEXT | {"model_type": "llama"},
        "image_token_id": _IMAGE,
        "scale_factor": 2,
        "tie_word_embeddings": True,
    },
    "smolvlm": {
        "vision_config": _TOWER,
        "text_config": _TEXT | {"model_type": "llama"},
        "image_token_id": _IMAGE,
        "scale_factor": 2,
    },
}
_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def make(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights; norms and biases are not at their trivial first values."""
    torch.manual_seed(0)
    model: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **KINDS[kind]))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.2)
    return model.to(dtype).eval()


def save(directory: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint directory as transformers writes and publishes it."""
    model: Any = make(kind, dtype)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    files = _processor_files(kind)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def tokenizer() -> PreTrainedTokenizerFast:
    """Word level, with a token for images."""
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(_WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<PAD>",
        additional_special_tokens=_SPECIAL,
        extra_special_tokens={"image_token": "<image>"},
    )


def _processor_files(kind: str) -> dict[str, Any]:
    images: dict[str, Any]
    square = {"height": SIZE, "width": SIZE}
    if kind == "llava":
        images = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIZE}, "crop_size": square}
        processor = {
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "processor_class": "LlavaProcessor",
        }
        return {"preprocessor_config.json": images, "processor_config.json": processor}
    if kind == "paligemma":
        return {
            "preprocessor_config.json": {
                "image_processor_type": "SiglipImageProcessor",
                "processor_class": "PaliGemmaProcessor",
                "size": square,
                "image_seq_length": (SIZE // PATCH) ** 2,
            }
        }
    if kind.startswith("qwen"):
        images = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "patch_size": PATCH,
            "merge_size": 2,
            "temporal_patch_size": 2,
            "min_pixels": SIZE**2,
            "max_pixels": SIZE**2,
        }
        template = _TEMPLATE.replace("IMAGE", "<|vision_start|><image><|vision_end|>")
        return {"preprocessor_config.json": images, "chat_template.jinja": template}
    images = {
        "image_processor_type": "SmolVLMImageProcessor" if kind == "smolvlm" else "Idefics3ImageProcessor",
        "do_image_splitting": False,
        "size": {"longest_edge": SIZE},
        "max_image_size": {"longest_edge": SIZE},
    }
    tokens = {"image_seq_len": 4, "processor_class": "SmolVLMProcessor" if kind == "smolvlm" else "Idefics3Processor"}
    template = _TEMPLATE.replace("IMAGE", "<image>")
    return {"preprocessor_config.json": images, "processor_config.json": tokens, "chat_template.jinja": template}
