"""Safetensors files from memory or from other files, one tensor at a time, whole or not at all.

The bytes are those of ``safetensors.torch.save_file``: within a file, wide dtypes first and then by name. So they
depend on the tensors, and not on where these came from.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaquant.checkpoint.json_files import write_json
from vlaquant.checkpoint.syncing import sync_directory
from vlaquant.checkpoint.tensor_files import DTYPES, LENGTH_BYTES, TensorFiles, tensor_bytes
from vlaquant.errors import CheckpointError, ExportError

MAX_SHARD_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_METADATA = {"format": "pt"}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor to be written: what the header says of it, and its bytes in pieces when their turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    bytes: int
    pieces: Callable[[], Iterable[memoryview]] = field(compare=False)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file from tensors of any device; at most one of them is copied at a time.

    The file appears under its name when it is complete and on the disk, replacing one of that name. A killed run can
    leave ``.NAME.partial`` beside it, which the next call for the same file overwrites.

    Raises:
        CheckpointError: a dtype that safetensors has not.
        ExportError: the disk is full or cannot be written.
    """
    _write(path, _items(tensors), metadata or {})


def write_tensors(
    directory: Path,
    tensors: Mapping[str, Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    numbered: bool = False,
) -> None:
    """Write ``model.safetensors``, or numbered shards of at most ``max_shard_bytes`` with an index.

    ``numbered`` writes a numbered shard and an index even where one file would do.

    Raises:
        CheckpointError, ExportError: as :func:`write_tensor_file`.
    """
    _write_shards(directory, _items(tensors), max_shard_bytes, numbered=numbered)


def write_made_tensors(
    directory: Path,
    empty: Mapping[str, Tensor],
    make: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """:func:`write_tensors` for tensors that are made one at a time: the same bytes, in the memory of one.

    Args:
        directory: where the files are written.
        empty: dtypes and shapes by name, in the order in which shards fill; tensors on the meta device will do.
        make: name -> tensor, called once for each, in the order of the files.
        max_shard_bytes: a shard holds more only if it is a single tensor.

    Raises:
        CheckpointError, ExportError: as :func:`write_tensor_file`; a tensor that is not as ``empty`` says.
    """
    _write_shards(directory, _items(empty, make), max_shard_bytes)


def join_tensor_files(
    sources: Sequence[tuple[str, TensorFiles, str]],
    directory: Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    numbered: bool = False,
) -> None:
    """:func:`write_tensors` for tensors that lie in files: the same bytes, in a few MiB of memory.

    Args:
        sources: (name in the output, files that hold the tensor, its name there), in the order in which shards fill.
        directory: where the files are written.
        max_shard_bytes: a shard holds more only if it is a single tensor.
        numbered: as for :func:`write_tensors`.

    Raises:
        CheckpointError: one output name twice, or a source that changed while it was being read.
        ExportError: the disk is full or cannot be written.
    """
    items: dict[str, _Item] = {}
    for name, files, source_name in sources:
        if name in items:
            raise CheckpointError(f"{directory}: two tensors are to be written under the name {name}")
        entry = files[source_name]
        pieces = _file_pieces(files, source_name)
        items[name] = _Item(name, entry.dtype, entry.shape, entry.end - entry.start, pieces)
    _write_shards(directory, list(items.values()), max_shard_bytes, numbered=numbered)


def _file_pieces(files: TensorFiles, name: str) -> Callable[[], Iterator[memoryview]]:
    return lambda: files.pieces(name)


def _memory_pieces(name: str, empty: Tensor, make: Callable[[str], Tensor]) -> Callable[[], Iterator[memoryview]]:
    def pieces() -> Iterator[memoryview]:
        tensor = make(name).detach()
        if (tensor.dtype, tensor.shape) != (empty.dtype, empty.shape):
            raise ExportError(
                f"{name}: made as {tensor.dtype} {list(tensor.shape)}, wanted {empty.dtype} {list(empty.shape)}"
            )
        yield tensor_bytes(tensor.cpu().contiguous())

    return pieces


def _items(empty: Mapping[str, Tensor], make: Callable[[str], Tensor] | None = None) -> list[_Item]:
    """One item a tensor; without ``make`` the mapping holds the tensors themselves."""
    for name, tensor in empty.items():
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{name} has dtype {tensor.dtype}, which safetensors cannot hold")
    make = make or empty.__getitem__
    return [
        _Item(name, tensor.dtype, tuple(tensor.shape), tensor.nbytes, _memory_pieces(name, tensor, make))
        for name, tensor in empty.items()
    ]


def _split(items: Sequence[_Item], max_shard_bytes: int) -> list[list[_Item]]:
    """``items`` in their order; a new shard begins where the next one would make it too big."""
    shards: list[list[_Item]] = [[]]
    size = 0
    for item in items:
        if shards[-1] and size + item.bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item.bytes
    return shards


def _write_shards(directory: Path, items: Sequence[_Item], max_shard_bytes: int, *, numbered: bool = False) -> None:
    shards = _split(items, max_shard_bytes)
    if len(shards) == 1 and not numbered:
        _write(directory / SINGLE, shards[0], _METADATA)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write(directory / file, shard, _METADATA)
        weight_map |= {item.name: file for item in shard}
    total = sum(item.bytes for item in items)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write(path: Path, items: Iterable[_Item], metadata: Mapping[str, str]) -> None:
    """One file: complete, flushed to the disk, then renamed."""
    ordered = sorted(items, key=lambda item: (_RANK[item.dtype], item.name.encode()))
    # Not called *.safetensors, so that nobody takes it for weights
    partial = path.with_name(f".{path.name}.partial")
    try:
        try:
            with partial.open("wb") as file:
                file.write(_header(ordered, metadata))
                for item in ordered:
                    file.writelines(item.pieces())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)  # else a power cut could undo the rename
    except OSError as error:
        raise ExportError(f"{path}: could not be written, and nothing was: {error}") from error


def _header(ordered: Iterable[_Item], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded with spaces so that the tensors begin at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for item in ordered:
        end = start + item.bytes
        header[item.name] = {"dtype": _CODES[item.dtype], "shape": item.shape, "data_offsets": (start, end)}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text
