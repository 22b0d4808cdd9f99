"""A model directory: what it must hold, and what travels beside the weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaquant.checkpoint.json_files import read_json
from vlaquant.checkpoint.tensor_files import TensorFiles
from vlaquant.checkpoint.tensor_writing import INDEX, SINGLE
from vlaquant.errors import CheckpointError

MANIFEST = "vlaquant.json"
#: Part of the name of a directory that is still being written.
PARTIAL = ".partial-"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory.

    Raises:
        CheckpointError: no such directory, no config.json, or it is not valid JSON.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{directory}: holds no config.json, so it is not a model directory")
    return read_json(path)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model: those of the index, or ``model.safetensors``, or all.

    Raises:
        CheckpointError: none (with a hint if there are pickles), or one that the index names is missing.
    """
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{directory}: the index names files that are missing: {', '.join(missing)}")
        return [directory / name for name in names]
    single = directory / SINGLE
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if files:
        return files
    pickles = [path.name for pattern in _PICKLES for path in directory.glob(pattern)]
    if pickles:
        raise CheckpointError(
            f"{directory}: holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are "
            "opened. Convert them to safetensors with the program that made them"
        )
    raise CheckpointError(f"{directory}: holds no *.safetensors file")


def read_tensors(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the files, one at a time.

    Raises:
        CheckpointError: a truncated or damaged file.
    """
    with TensorFiles.open(files) as tensors:
        for name in tensors:
            yield name, tensors.read(name)


def check_source(directory: Path, *, values: bool = True) -> dict[str, Any]:
    """Check a model directory before it is used: complete, readable, finite. Returns its config.

    Args:
        directory: the float checkpoint.
        values: read every tensor and refuse NaN and infinity; otherwise only the headers are read, and whoever reads a
            tensor later calls :func:`require_finite`.

    Raises:
        CheckpointError: what :func:`read_config`, :func:`weight_files` and :class:`TensorFiles` raise, NaN or infinite
            weights, tensors that the index names and no file holds, or a model that is quantized already.
    """
    config = read_config(directory)
    if "quantization_config" in config:
        raise CheckpointError(f"{directory}: is quantized already; start from the float checkpoint")
    with TensorFiles.open(weight_files(directory)) as tensors:
        _check_index(directory, tensors)
        for name in tensors.names() if values else ():
            require_finite(name, tensors.read(name), directory)
    return config


def _check_index(directory: Path, tensors: TensorFiles) -> None:
    index = directory / INDEX
    if index.is_file():
        missing = [name for name in read_json(index).get("weight_map", {}) if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{directory}: the index names {len(missing)} tensors that no file holds: {', '.join(missing[:5])}"
            )


def require_finite(name: str, tensor: Tensor, directory: Path) -> None:
    """Refuse a tensor of ``directory`` with NaN or infinite values.

    Raises:
        CheckpointError: it has some; says how many.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    if tensor.element_size() == 1:  # torch compares no float8
        tensor = tensor.half() if tensor.dtype is not torch.float8_e8m0fnu else tensor.float()
    # NaN comes through both; ten times as fast as isfinite, and without its temporaries of the tensor's size
    if not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor)):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"{directory}: {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}")


def side_files(directory: Path) -> list[Path]:
    """Files that travel beside the weights (tokenizer, processor, statistics, action heads), relative paths."""
    weights = {path.name for path in weight_files(directory)}
    own = {"config.json", MANIFEST, INDEX}
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return [path for path in paths if str(path) not in weights | own and not path.parts[0].startswith(".")]


def read_manifest(directory: Path, *, unfinished: bool = False) -> dict[str, Any]:
    """``vlaquant.json`` of a directory that vlaquant finished.

    Args:
        directory: the quantized checkpoint.
        unfinished: accept one that is still being written; only verification does.

    Raises:
        CheckpointError: not written by vlaquant, or not completely.
    """
    read_config(directory)
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{directory}: holds no {MANIFEST}: not a vlaquant checkpoint, or its writing was cut off"
        )
    manifest = read_json(path)
    if not unfinished and (PARTIAL in directory.name or manifest.get("complete") is not True):
        raise CheckpointError(f"{directory}: its writing was cut off before it was verified; quantize again")
    return manifest
