"""Write a checkpoint with the shape of openvla-7b and random weights, to measure what a real one costs.

python scripts/make_synthetic_checkpoint.py --output DIRECTORY [--size 7b|eighth] [--layers N] [--episodes DIRECTORY]

Everything but the numbers is as in the published directory: config.json, names and shapes of the weights, bfloat16,
shards of 5 GB, a processor for images of 224 pixels. The weights have realistic scales and mean nothing, and the
tokenizer is made up to match: one token a word, unknown words all the same token. ``eighth`` divides every width by 8.
Only one tensor is in memory at a time. ``--episodes`` also writes observations to calibrate with: noise for images,
instructions that the tokenizer knows, random actions.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from vlaquant.checkpoint import atomic_directory, weight_files, write_json, write_made_tensors
from vlaquant.evaluate.metaworld import INSTRUCTIONS
from vlaquant.families import FAMILIES
from vlaquant.models.openvla import (
    OpenVLAConfig,
    PrismaticImageProcessor,
    PrismaticProcessor,
    prompt,
    tower_to_dict,
)
from vlaquant.models.openvla.configuration import tower_from_timm_id

SIZES = {"7b": 1, "eighth": 8}
IMAGE_SIZE = 224
TOWERS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
EMPTY_TOKEN = "▁"
EMPTY_TOKEN_ID = 29871  # in Llama's tokenizer
_BINS = 256
_PADDING_ROWS = 64
_VOCABULARY = 32000
_PIECE = 2**18  # numbers drawn at a time; larger ones leave the processor's cache, and it takes half as long again
_IMAGENET = ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_config(size: str = "7b", layers: int | None = None) -> OpenVLAConfig:
    """The published configuration; ``layers`` keeps that many blocks of the language model."""
    divisor = SIZES[size]
    return OpenVLAConfig(
        architectures=["OpenVLAForActionPrediction"],
        dtype="bfloat16",
        arch_specifier="no-align+fused-gelu-mlp",
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="llama2-7b-pure",
        llm_max_length=2048,
        use_fused_vision_backbone=True,
        image_resize_strategy="resize-naive",
        image_sizes=[IMAGE_SIZE, IMAGE_SIZE],
        norm_stats=_norm_stats(),
        n_action_bins=_BINS,
        pad_to_multiple_of=_PADDING_ROWS,
        empty_token_id=EMPTY_TOKEN_ID,
        text_config={
            "model_type": "llama",
            "vocab_size": _VOCABULARY + _PADDING_ROWS,
            "hidden_size": 4096 // divisor,
            "intermediate_size": 11008 // divisor,
            "num_hidden_layers": 32 if layers is None else layers,
            "num_attention_heads": 32 // divisor,
            "num_key_value_heads": 32 // divisor,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "pad_token_id": _VOCABULARY,
            "dtype": "bfloat16",
        },
        **({"timm_model_ids": list(TOWERS)} if divisor == 1 else {"vision_towers": _smaller_towers(divisor)}),
    )


def _smaller_towers(divisor: int) -> list[dict[str, Any]]:
    towers = [tower_to_dict(tower_from_timm_id(model_id)) for model_id in TOWERS]
    # SigLIP's 4304 becomes 544: like 4304 it is 16 times a number that no group size divides
    return [
        tower
        | {"width": tower["width"] // divisor, "heads": tower["heads"] // divisor}
        | {"mlp": math.ceil(tower["mlp"] / divisor / 16) * 16}
        for tower in towers
    ]


def _norm_stats() -> dict[str, Any]:
    """One made-up dataset: 7 dimensions, of which the gripper's is not normalised."""
    high = [0.03, 0.04, 0.04, 0.08, 0.08, 0.2, 1.0]
    low = [*(-value for value in high[:-1]), 0.0]
    return {"synthetic": {"action": {"q01": low, "q99": high, "mask": [True] * 6 + [False]}}}


def make_processor(config: OpenVLAConfig) -> PrismaticProcessor:
    """Images for the model's towers, and a tokenizer that fills its vocabulary."""
    towers = len(config.image_sizes)
    image_processor = PrismaticImageProcessor(
        use_fused_vision_backbone=towers == 2,
        input_sizes=[[3, size, size] for size in config.image_sizes],
        interpolations=["bicubic"] * towers,
        means=[_IMAGENET[0], _HALF[0]][:towers],
        stds=[_IMAGENET[1], _HALF[1]][:towers],
    )
    return PrismaticProcessor(image_processor, _make_tokenizer(config))


def _make_tokenizer(config: OpenVLAConfig) -> PreTrainedTokenizerFast:
    """Special tokens and the empty one where Llama has them, then words, then filling; padding comes last."""
    split = pre_tokenizers.Whitespace()
    prompts = [prompt(text) for text in ("do something", *INSTRUCTIONS.values())]
    words = sorted({piece for text in prompts for piece, _ in split.pre_tokenize_str(text)})
    tokens = {"<unk>": 0, "<s>": 1, "</s>": 2, EMPTY_TOKEN: config.empty_token_id, "<PAD>": config.action_vocab_size}
    free = [index for index in range(3, config.action_vocab_size) if index != config.empty_token_id]
    names = [*words, *(f"<{index}>" for index in free[len(words) :])]
    tokens |= dict(zip(names, free, strict=True))
    inner = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    inner.pre_tokenizer = split
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<PAD>"
    )


def make_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bfloat16 values that depend on the name and the seed, and on nothing else.

    Matrices and filters are normal with standard deviation 1/√inputs, norms and layer scales lie near 1, biases,
    positions and learned tokens near 0.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7]))
    mean, std = 0.0, 0.02
    if len(shape) == 1 and not name.endswith(".bias"):
        mean, std = 1.0, 0.1
    elif len(shape) > 1 and shape[0] > 1:
        std = 1.0 / math.sqrt(math.prod(shape[1:]))
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    drawn = torch.empty(min(_PIECE, tensor.numel()))
    for piece in tensor.view(-1).split(_PIECE):
        piece.copy_(drawn[: len(piece)].normal_(mean, std, generator=generator))
    return tensor


def write_checkpoint(config: OpenVLAConfig, output: Path, *, seed: int = 0, overwrite: bool = False) -> None:
    """The whole directory; nothing is left if it fails.

    Raises:
        ExportError: the output exists, or the disk is full.
    """
    with atomic_directory(output, overwrite=overwrite) as directory:
        write_json(directory / "config.json", json.loads(config.to_json_string(use_diff=False)))
        make_processor(config).save_pretrained(directory)
        write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
        empty = FAMILIES["openvla"].build(directory).state_dict()
        write_made_tensors(directory, empty, lambda name: make_tensor(name, tuple(empty[name].shape), seed))


def write_episodes(config: OpenVLAConfig, directory: Path, count: int, *, seed: int = 0) -> None:
    """Made-up observations as the split ``calibration``; image, instruction and action change with each."""
    random = np.random.default_rng(seed)
    (statistics,) = config.norm_stats.values()
    low, high = statistics["action"]["q01"], statistics["action"]["q99"]
    tasks = list(INSTRUCTIONS.items())
    rows = [
        {
            "image": Image.fromarray(
                random.integers(0, 256, (config.image_sizes[0], config.image_sizes[0], 3), np.uint8)
            ),
            "instruction": tasks[index % len(tasks)][1],
            "action": random.uniform(low, high).tolist(),
            "episode": index,
            "task": tasks[index % len(tasks)][0],
        }
        for index in range(count)
    ]
    (directory / "calibration").mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(directory / "calibration" / "data.parquet")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a checkpoint shaped like openvla-7b, with random weights.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--size", choices=SIZES, default="7b", help="the published widths, or an eighth of them")
    parser.add_argument("--layers", type=int, metavar="N", help="blocks of the language model (default: 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--episodes", type=Path, metavar="DIR", help="write observations to calibrate with here")
    parser.add_argument("--observations", type=int, default=128, metavar="N", help="how many of them")
    args = parser.parse_args()
    config = make_config(args.size, args.layers)
    begin = time.perf_counter()
    write_checkpoint(config, args.output, seed=args.seed, overwrite=args.overwrite)
    seconds = time.perf_counter() - begin
    files = weight_files(args.output)
    size = sum(path.stat().st_size for path in files)
    print(f"{args.output}: {size:,} bytes in {len(files)} weight files, {seconds:.0f} s")
    if args.episodes is not None:
        write_episodes(config, args.episodes, args.observations, seed=args.seed)


if __name__ == "__main__":
    main()
