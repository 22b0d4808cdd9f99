"""The demo policy before training: a tiny OpenVLA, its tokenizer and its processor."""

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticImageProcessor,
    PrismaticProcessor,
    TowerConfig,
    prompt,
    tower_to_dict,
)

IMAGE_SIZE = 112
CHUNK = 4
ACTION_DIMENSION = 4
DATASET = "metaworld"
_BINS = 256
_PADDING_ROWS = 64
_IMAGENET = ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: special tokens, the words of all prompts, query tokens, and 256 action tokens last."""
    words = sorted({piece for text in INSTRUCTIONS.values() for piece in _split(prompt(text))})
    queries = [f"<query_{index}>" for index in range(CHUNK * ACTION_DIMENSION)]
    actions = [f"<action_{bin_}>" for bin_ in range(_BINS - 1, -1, -1)]
    vocabulary = ["<unk>", "<s>", "</s>", "<PAD>", "▁", *words, *queries, *actions]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def _split(text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


def make_processor() -> PrismaticProcessor:
    """Images for both towers at ``IMAGE_SIZE`` pixels, and the tokenizer."""
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=True,
        input_sizes=[[3, IMAGE_SIZE, IMAGE_SIZE]] * 2,
        interpolations=["bicubic", "bicubic"],
        means=[_IMAGENET[0], _HALF[0]],
        stds=[_IMAGENET[1], _HALF[1]],
    )
    return PrismaticProcessor(image_processor, make_tokenizer())


def action_quantiles(actions: NDArray[np.float32]) -> dict[str, dict[str, dict[str, list[float] | list[bool]]]]:
    """``norm_stats`` for recorded actions [t, dimension]."""
    return {
        DATASET: {
            "action": {
                "q01": np.quantile(actions, 0.01, axis=0).tolist(),
                "q99": np.quantile(actions, 0.99, axis=0).tolist(),
                "mask": [True] * actions.shape[1],
            }
        }
    }


def make_model(processor: PrismaticProcessor, actions: NDArray[np.float32]) -> OpenVLAForActionPrediction:
    """An untrained policy of 4.4 million parameters."""
    tower = TowerConfig(width=128, depth=4, heads=4, mlp=512, patch=16)
    dino = tower_to_dict(tower) | {"registers": 4, "class_token": True, "layer_scale": 0.5}
    siglip = tower_to_dict(tower)
    tokens = processor.tokenizer.get_vocab()
    config = OpenVLAConfig(
        vision_towers=[dino, siglip],
        image_sizes=[IMAGE_SIZE, IMAGE_SIZE],
        norm_stats=action_quantiles(actions),
        n_action_bins=_BINS,
        pad_to_multiple_of=_PADDING_ROWS,
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokens) + _PADDING_ROWS,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 512,
            "bos_token_id": tokens["<s>"],
            "eos_token_id": tokens["</s>"],
            "pad_token_id": tokens["<PAD>"],
        },
        action_chunk=CHUNK,
        action_decoding="parallel",
        action_query_token_ids=[tokens[f"<query_{index}>"] for index in range(CHUNK * ACTION_DIMENSION)],
        empty_token_id=tokens["▁"],
    )
    model = OpenVLAForActionPrediction(config)
    model.processor = processor
    return model.float()
