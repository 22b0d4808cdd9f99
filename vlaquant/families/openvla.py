"""OpenVLA and its fine-tunes, through our own model class."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import AutoProcessor

from vlaquant.errors import CalibrationError
from vlaquant.families.base import Family, Fold, Inputs, empty_weights, llama_folds
from vlaquant.models.openvla import OpenVLAConfig, OpenVLAForActionPrediction
from vlaquant.models.openvla.actions import action_statistics, normalize

_TOWER_BLOCK = r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+"


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One recorded moment: what the camera saw, what was asked for, and what the demonstrator did.

    ``action`` is [action dimension] or [chunk, action dimension] in the units of the dataset ``unnorm_key``, which may
    be None where the checkpoint knows only one.
    """

    image: Image.Image
    instruction: str
    action: NDArray[np.float64]
    episode: int
    task: str
    unnorm_key: str | None = None


def load_observations(
    directory: Path, split: str, count: int | None = None, unnorm_key: str | None = None
) -> list[Observation]:
    """Observations of a ``datasets``-readable folder with the columns image, instruction, action, episode and task.

    ``count`` takes that many, evenly spread over the split.

    Raises:
        CalibrationError: no such folder or split, or it is empty.
    """
    if not (directory / split).is_dir():
        raise CalibrationError(f"{directory}: no split {split!r} (a folder of parquet files of that name)")
    if not any((directory / split).glob("*.parquet")):
        raise CalibrationError(f"{directory / split}: holds no parquet file")
    rows = load_dataset("parquet", data_files=str(directory / split / "*.parquet"), split="train")
    if len(rows) == 0:
        raise CalibrationError(f"{directory / split}: holds no observation")
    if count is not None and count < len(rows):
        rows = rows.select(np.linspace(0, len(rows) - 1, count).round().astype(int).tolist())
    return [
        Observation(
            image=row["image"],
            instruction=row["instruction"],
            action=np.asarray(row["action"], dtype=np.float64),
            episode=int(row["episode"]),
            task=row["task"],
            unnorm_key=unnorm_key,
        )
        for row in rows
    ]


def _load(directory: Path) -> nn.Module:
    model: OpenVLAForActionPrediction = OpenVLAForActionPrediction.from_pretrained(
        directory, dtype="auto", local_files_only=True
    )
    _attach_side_files_(model, directory)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _build(directory: Path) -> nn.Module:
    config = OpenVLAConfig.from_pretrained(directory, local_files_only=True)
    with empty_weights(config.dtype):
        model = OpenVLAForActionPrediction(config)
    _attach_side_files_(model, directory)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _attach_side_files_(model: OpenVLAForActionPrediction, directory: Path) -> None:
    """Processor, and the statistics that fine-tunes keep in a file of their own.

    Old checkpoints call the processor's file ``preprocessor_config.json``, new ones ``processor_config.json``.
    """
    if any((directory / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        model.processor = AutoProcessor.from_pretrained(directory, local_files_only=True)
    statistics = directory / "dataset_statistics.json"
    if statistics.is_file():
        datasets = json.loads(statistics.read_text(encoding="utf-8"))
        model.config.norm_stats |= {name: stats for name, stats in datasets.items() if "action" in stats}


def _dead(model: nn.Module) -> dict[str, str]:
    assert isinstance(model, OpenVLAForActionPrediction)
    dead = {}
    for tower in ("featurizer", "fused_featurizer"):
        module = getattr(model.vision_backbone, tower)
        if module is None:
            continue
        last = f"vision_backbone.{tower}.blocks.{len(module.blocks) - 1}."
        pool = f"vision_backbone.{tower}.attn_pool."
        for name, child in model.named_modules():
            if type(child) is nn.Linear and name.startswith(last):
                dead[name] = "features come from the block before"
            elif type(child) is nn.Linear and name.startswith(pool):
                dead[name] = "the pooling head never runs"
    return dead


def _inputs(model: OpenVLAForActionPrediction, sample: Any) -> Inputs:
    """Prompt and image; for token-by-token policies the demonstrated action's tokens too (a teacher-forced pass)."""
    input_ids, pixel_values = model.encode(sample.image, sample.instruction)
    if model.config.action_decoding == "autoregressive":
        stats = action_statistics(model.config.norm_stats, sample.unnorm_key)
        tokens = model.action_tokens.encode(normalize(sample.action, stats)).reshape(1, -1)
        input_ids = torch.cat([input_ids, torch.from_numpy(tokens[:, :-1]).to(input_ids.device)], dim=1)
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def _run(model: OpenVLAForActionPrediction, inputs: Inputs) -> Tensor:
    """Logits [1, t, vocabulary] of the pass that decides the action."""
    input_ids = inputs["input_ids"]
    if model.config.action_decoding == "parallel":
        queries = torch.tensor([model.config.action_query_token_ids], device=input_ids.device)
        input_ids = torch.cat([input_ids, queries], dim=1)
    logits: Tensor = model(input_ids, pixel_values=inputs["pixel_values"], use_cache=False).logits
    return logits


def _example(model: OpenVLAForActionPrediction) -> Inputs:
    size = model.config.image_sizes[0]
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    input_ids, pixel_values = model.encode(image, "do something")
    return {"input_ids": input_ids, "pixel_values": pixel_values}


def _check(model: OpenVLAForActionPrediction, inputs: Inputs) -> None:
    model.check_sight(inputs["input_ids"], inputs["pixel_values"])


def _episode_samples(directory: Path, split: str, count: int, unnorm_key: str | None) -> Sequence[Any]:
    return load_observations(directory, split, count, unnorm_key)


OPENVLA = Family(
    name="openvla",
    parts=(
        ("vision", r"vision_backbone\..*"),
        ("projector", r"projector\..*"),
        ("language", r"language_model\.model\..*"),
        ("action", r"language_model\.lm_head"),
    ),
    folds=(
        Fold(_TOWER_BLOCK, "{block}.norm1", ("{block}.attn.qkv",)),
        Fold(_TOWER_BLOCK, "{block}.norm2", ("{block}.mlp.fc1",)),
        *llama_folds(r"language_model\.model\.layers\.\d+"),
    ),
    owns=lambda model: isinstance(model, OpenVLAForActionPrediction),
    owns_config=lambda config: config.get("model_type") == "openvla",
    load=_load,
    build=_build,
    dead=_dead,
    inputs=_inputs,
    run=_run,
    example=_example,
    check=_check,
    episode_samples=_episode_samples,
)
