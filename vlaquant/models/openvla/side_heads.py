"""The heads of an OpenVLA-OFT directory, which its training leaves beside the model as ``NAME--STEP_checkpoint.pt``.

Such a file is a pickle. It is read with ``weights_only=True``, which builds tensors and nothing else, and what vlaquant
writes holds the tensors in ``model.safetensors``.

The files do not say how many actions a chunk has nor how many cameras there are: in the original those are arguments of
the script that runs the policy. Here they are fields of config.json, or of ``oft.json`` beside it, which leaves a
published directory as it is.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaquant.errors import CheckpointError

#: File with the fields that the heads do not tell; its keys are those of config.json.
OFT_FILE = "oft.json"
_SAID = ("action_chunk", "num_images_in_input")
_MAY_SAY = (*_SAID, "action_normalization", "stop_token_id")
_ACTION_HEAD, _PROPRIO = "action_head", "proprio_projector"
_REFUSED = {
    "vision_backbone": "its vision towers are conditioned on the instruction (FiLM)",
    "noisy_action_projector": "its actions are denoised by diffusion",
}
_DATA_PARALLEL = "module."
_EXAMPLE = (
    '{"action_chunk": 8, "num_images_in_input": 2} for LIBERO, '
    '{"action_chunk": 25, "num_images_in_input": 3, "action_normalization": "min_max"} for ALOHA'
)


@dataclass(frozen=True, slots=True)
class SideHeads:
    """Heads that lie beside a model.

    Attributes:
        files: name of the module in the model -> its file.
        said: file that says the rest; None if config.json does.
        fields: of config.json, as they follow from both.
    """

    files: dict[str, Path]
    said: Path | None
    fields: dict[str, Any]


def find_side_heads(directory: Path, config: Mapping[str, Any], width: int) -> SideHeads | None:
    """The heads beside a model; None if there are none. Only their shapes are read.

    Args:
        directory: of the checkpoint.
        config: its config.json.
        width: of the language model.

    Raises:
        CheckpointError: heads that vlaquant cannot run, two of one kind, one of a strange shape, or a directory that
            does not say how many actions and images there are.
    """
    for kind, reason in _REFUSED.items():
        if file := _only(directory, kind):
            raise CheckpointError(f"{file}: a policy that vlaquant cannot run: {reason}. Use one trained without that")
    head, proprio = _only(directory, _ACTION_HEAD), _only(directory, _PROPRIO)
    if head is None:
        if proprio is not None:
            raise CheckpointError(f"{proprio}: lies there without action_head--*.pt; copy that from the training too")
        return None
    said = directory / OFT_FILE if (directory / OFT_FILE).is_file() else None
    fields = _said(directory, config, said) | _head_fields(head, width)
    if proprio is not None:
        fields["proprio_dim"] = _proprio_dim(proprio, width)
    files = {_ACTION_HEAD: head} | ({} if proprio is None else {_PROPRIO: proprio})
    return SideHeads(files, said, fields)


def read_side_heads(heads: SideHeads, dtype: torch.dtype | str | None) -> dict[str, Tensor]:
    """All tensors under their names in the model, cast to ``dtype`` as the original does; None keeps theirs.

    Raises:
        CheckpointError: a file that cannot be read, or with values that are NaN or infinite.
    """
    cast = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    tensors = {}
    for module, file in heads.files.items():
        for name, tensor in _read(file, "cpu").items():
            if not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(f"{file}: {name} holds values that are NaN or infinite")
            tensors[f"{module}.{name}"] = tensor.to(cast or tensor.dtype).contiguous()
    return tensors


def _only(directory: Path, kind: str) -> Path | None:
    """The one file of this kind; None if there is none."""
    files = sorted(directory.glob(f"{kind}--*.pt"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"{directory}: holds {len(files)} files of one kind ({names}); keep the one of the model")
    return files[0] if files else None


def _said(directory: Path, config: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """What the heads do not tell, from ``oft.json`` or else from config.json."""
    content: Any = {}
    if file is not None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file}: not valid JSON: {error}") from error
        unknown = sorted(set(content) - set(_MAY_SAY)) if isinstance(content, dict) else ["no object"]
        if unknown:
            raise CheckpointError(f"{file}: holds {', '.join(unknown)}; wanted an object with {', '.join(_MAY_SAY)}")
    fields: dict[str, Any] = {key: config[key] for key in _MAY_SAY if key in config} | content
    missing = [key for key in _SAID if key not in fields]
    if missing:
        raise CheckpointError(
            f"{directory}: an OpenVLA-OFT policy (it holds action_head--*.pt) that does not say "
            f"{' and '.join(missing)}, which its files cannot tell. Write them to {OFT_FILE} in that directory: "
            f"{_EXAMPLE}"
        )
    return fields


def _head_fields(file: Path, width: int) -> dict[str, Any]:
    shapes = {name: tuple(tensor.shape) for name, tensor in _read(file, "meta").items()}
    if any(name.startswith("noise_predictor.") for name in shapes):
        raise CheckpointError(f"{file}: a policy that vlaquant cannot run: {_REFUSED['noisy_action_projector']}")
    dimension = shapes.get("model.fc2.bias", (0,))[0]
    blocks = len({name.split(".")[2] for name in shapes if name.startswith("model.mlp_resnet_blocks.")})
    _require_shapes(file, shapes, _head_shapes(width, dimension, blocks))
    return {"action_decoding": "regression", "action_dim": dimension, "action_head_blocks": blocks}


def _head_shapes(width: int, dimension: int, blocks: int) -> dict[str, tuple[int, ...]]:
    sizes: dict[str, tuple[int, ...]] = {
        "model.layer_norm1": (width * dimension,),
        "model.fc1": (width, width * dimension),
        "model.layer_norm2": (width,),
        "model.fc2": (dimension, width),
    }
    for block in range(blocks):
        sizes[f"model.mlp_resnet_blocks.{block}.ffn.0"] = (width,)
        sizes[f"model.mlp_resnet_blocks.{block}.ffn.1"] = (width, width)
    return {f"{name}.weight": size for name, size in sizes.items()} | {
        f"{name}.bias": size[:1] for name, size in sizes.items()
    }


def _proprio_dim(file: Path, width: int) -> int:
    shapes = {name: tuple(tensor.shape) for name, tensor in _read(file, "meta").items()}
    dimension = shapes.get("fc1.weight", (0, 0))[-1]
    weights: dict[str, tuple[int, ...]] = {"fc1.weight": (width, dimension), "fc2.weight": (width, width)}
    _require_shapes(file, shapes, weights | {"fc1.bias": (width,), "fc2.bias": (width,)})
    return int(dimension)


def _require_shapes(file: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{file}: {name} has shape {found.get(name, 'none')}, wanted {wanted.get(name, 'no such tensor')} for the "
            f"language model of config.json ({len(wrong)} tensors differ); it belongs to another model"
        )


def _read(file: Path, device: str) -> dict[str, Tensor]:
    """Tensors without the prefix of data-parallel training; on the meta device only shapes are made."""
    try:
        content = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # whatever the bytes make the unpickler stumble over
        raise CheckpointError(f"{file}: cannot be read as tensors and nothing else: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{file}: holds {type(content).__name__}, wanted tensors by name")
    return {str(name).removeprefix(_DATA_PARALLEL): tensor for name, tensor in content.items()}
