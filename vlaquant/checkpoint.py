"""The only room that reads and writes checkpoint directories. Safetensors only; nothing is ever unpickled.

A directory is written beside its final place, verified there, and renamed when it is complete, so that a run that is
killed leaves nothing behind that looks like a result.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlaquant.errors import CheckpointError, ExportError

MANIFEST = "vlaquant.json"
_PARTIAL = ".partial-"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_MAX_SHARD_BYTES = 5 * 10**9


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
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: holds {type(data).__name__}, wanted an object")
    return data


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold the model: those of the index, or ``model.safetensors``, or all.

    Raises:
        CheckpointError: none (with a hint if there are pickles), or one that the index names is missing.
    """
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing:
            raise CheckpointError(f"{directory}: the index names files that are missing: {', '.join(missing)}")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
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
    for path in files:
        try:
            with safe_open(path, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118  safe_open is no mapping
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read, it may be truncated: {error}") from error


def check_source(directory: Path) -> dict[str, Any]:
    """Read a whole model directory once: complete, readable, finite. Returns its config.

    Raises:
        CheckpointError: what :func:`read_config`, :func:`weight_files` and :func:`read_tensors` raise, NaN or infinite
            weights, or a model that is quantized already.
    """
    config = read_config(directory)
    if "quantization_config" in config:
        raise CheckpointError(f"{directory}: is quantized already; start from the float checkpoint")
    for name, tensor in read_tensors(weight_files(directory)):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                f"{directory}: {name} holds {bad} values that are NaN or infinite, of {tensor.numel()}"
            )
    return config


def side_files(directory: Path) -> list[Path]:
    """Files that travel beside the weights (tokenizer, processor, statistics, action heads), relative paths."""
    weights = {path.name for path in weight_files(directory)}
    own = {"config.json", MANIFEST, "model.safetensors.index.json"}
    paths = (path.relative_to(directory) for path in sorted(directory.rglob("*")) if path.is_file())
    return [path for path in paths if str(path) not in weights | own and not path.parts[0].startswith(".")]


def copy_side_files(source: Path, target: Path) -> dict[str, str]:
    """Copy them byte for byte; returns their SHA-256 sums."""
    sums = {}
    for path in side_files(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
        sums[str(path)] = sha256(target / path)
    return sums


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors``, or shards of at most 5 GB with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > _MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += bytes_
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an indented JSON file."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


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
    manifest = _read_json(path)
    if not unfinished and (_PARTIAL in directory.name or manifest.get("complete") is not True):
        raise CheckpointError(f"{directory}: its writing was cut off before it was verified; quantize again")
    return manifest


def sha256(path: Path) -> str:
    """SHA-256 sum of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something, before hours are spent on it.

    Raises:
        ExportError: it exists and is not empty (without ``overwrite``), or it is no directory.
    """
    if directory.exists() and not directory.is_dir():
        raise ExportError(f"{directory}: exists and is not a directory")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise ExportError(f"{directory}: exists and is not empty; choose another output, or allow it with --overwrite")


@contextmanager
def atomic_directory(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A directory beside ``target`` to fill; it becomes ``target`` when the block ends without an error.

    Raises:
        ExportError: the output exists, or the disk is full; nothing is left behind.
    """
    check_output(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}{_PARTIAL}{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _replace(target, partial)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target}: could not be written, and nothing was: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Flush every file and every directory entry to the disk."""
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _replace(target: Path, complete: Path) -> None:
    """Rename ``complete`` to ``target``; an old ``target`` steps aside first and goes last."""
    old = target.parent / f".{target.name}{_PARTIAL}old-{uuid.uuid4().hex[:8]}"
    if target.exists():
        target.rename(old)
    try:
        complete.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
