"""Tiny models and checkpoint directories for tests: real classes, random weights, seconds to quantize."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from vlaquant.families.observation import Observation
from vlaquant.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
)

IMAGE_SIZE = 28
ACTION = 4
_WORDS = ["In", ":", "What", "action", "should", "the", "robot", "take", "to", "push", "?", "Out"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Word level, with the words of the prompt, 8 query tokens and 256 action tokens."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        "<PAD>",
        "▁",
        *_WORDS,
        *(f"<q{i}>" for i in range(8)),
        *(f"<a{i}>" for i in range(256)),
    ]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def openvla(*, parallel: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> OpenVLAForActionPrediction:
    """Two towers of width 64, a Llama of width 64 and 2 layers; every ``in_features`` divides by 64."""
    torch.manual_seed(seed)
    words = tokenizer().get_vocab()
    tower = {"width": 64, "depth": 3, "heads": 2, "mlp": 128, "patch": 14}
    config = OpenVLAConfig(
        vision_towers=[
            tower | {"registers": 4, "class_token": True, "layer_scale": 0.5},
            tower | {"attention_pool": True},
        ],
        image_sizes=[IMAGE_SIZE, IMAGE_SIZE],
        norm_stats={"tiny": {"action": {"q01": [-1.0] * ACTION, "q99": [1.0] * ACTION, "mask": [True] * ACTION}}},
        text_config={
            "model_type": "llama",
            "vocab_size": len(words) + 64,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pad_token_id": words["<PAD>"],
        },
        action_chunk=2 if parallel else 1,
        action_decoding="parallel" if parallel else "autoregressive",
        action_query_token_ids=[words[f"<q{i}>"] for i in range(8)] if parallel else None,
        empty_token_id=words["▁"],
    )
    model: Any = OpenVLAForActionPrediction(config)
    model.to(dtype).eval()
    model.processor = PrismaticProcessor(
        PrismaticImageProcessor(
            use_fused_vision_backbone=True,
            input_sizes=[[3, IMAGE_SIZE, IMAGE_SIZE]] * 2,
            interpolations=["bicubic"] * 2,
            means=[[0.5] * 3] * 2,
            stds=[[0.5] * 3] * 2,
        ),
        tokenizer(),
    )
    return model


def save_openvla(directory: Path, model: OpenVLAForActionPrediction) -> Path:
    """Write the policy as a checkpoint directory, with a side file."""
    assert model.processor is not None
    model.save_pretrained(directory)
    model.processor.save_pretrained(directory)
    (directory / "dataset_statistics.json").write_text("{}", encoding="utf-8")
    return directory


def observations(count: int = 4, seed: int = 0) -> list[Observation]:
    """Random images with random actions."""
    rng = np.random.default_rng(seed)
    return [
        Observation(
            images=(Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)),),
            instruction="push",
            action=rng.uniform(-1.0, 1.0, (2, ACTION)),
            episode=index,
            task="push",
        )
        for index in range(count)
    ]


def save_observations(directory: Path, split: str, seen: list[Observation]) -> Path:
    """Write observations as recorded episodes."""
    rows = [
        {
            "image": one.image,
            "instruction": one.instruction,
            "action": None if one.action is None else one.action.tolist(),
            "episode": one.episode,
            "task": one.task,
            **({} if one.state is None else {"state": one.state.tolist()}),
        }
        for one in seen
    ]
    (directory / split).mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(directory / split / "data.parquet")
    return directory


def llama(
    *, hidden: int = 64, dtype: torch.dtype = torch.float32, tied: bool = False, layers: int = 2
) -> LlamaForCausalLM:
    """Grouped-query attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden // 4,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def save_llama(directory: Path, model: LlamaForCausalLM) -> Path:
    """Write the language model with a tokenizer."""
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
