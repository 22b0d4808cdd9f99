"""Outputs of finished units, one for each sample, in memory or on the disk, given back exactly as they were."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlaquant.calibrate.outputs import CONTAINERS, DTYPES
from vlaquant.checkpoint import TensorFiles, write_json, write_tensor_file
from vlaquant.checkpoint.json_files import read_json
from vlaquant.checkpoint.syncing import sync_tree
from vlaquant.errors import CalibrationError, ExportError

_INDEX = "outputs.json"


@dataclass(slots=True, eq=False)
class _Entry:
    """One output.

    Attributes:
        number: of its files.
        outline: the nest as JSON, with shape, strides, dtype and device in the place of tensors.
        nbytes: of its tensors, as they are stored.
        tensors: contiguous, on the CPU; None if they are on the disk or were dropped.
        spilled: the file that holds them instead.
        saved: a file of the last :meth:`ActivationCache.save` that holds them too.
    """

    number: int
    outline: str
    nbytes: int = 0
    tensors: list[Tensor] | None = None
    spilled: Path | None = None
    saved: Path | None = None

    @property
    def kept(self) -> bool:
        return self.tensors is not None or self.spilled is not None


class ActivationCache:
    """Outputs by unit and sample. What was dropped still has an outline, from which a placeholder can be made.

    Args:
        limit_bytes: as much stays in memory; what comes after goes to ``spill_directory``. None for no limit.
        spill_directory: of this cache alone, made when it is needed; what lies there is deleted. Without one there is
            no limit.
    """

    def __init__(self, *, limit_bytes: int | None = None, spill_directory: Path | None = None) -> None:
        self._limit = limit_bytes
        self._spill = spill_directory
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._next = 0
        self._in_memory = self._spilled = 0
        if spill_directory is not None and spill_directory.exists():
            shutil.rmtree(spill_directory)

    @property
    def bytes_in_memory(self) -> int:
        """Of tensors."""
        return self._in_memory

    @property
    def bytes_spilled(self) -> int:
        """Of tensors that are on the disk only."""
        return self._spilled

    def put(self, unit: str, sample: int, output: Any) -> None:
        """Store an output, in place of an earlier one. The tensors are copied.

        Raises:
            ExportError: it goes to the disk, and that is full.
        """
        self.put_outline(unit, sample, output)
        self._keep(self._entries[unit, sample], [_pack(tensor) for tensor in _tensors(output)])

    def put_outline(self, unit: str, sample: int, output: Any) -> None:
        """Keep what a placeholder for this output looks like, without its values."""
        if (unit, sample) in self._entries:
            self._forget(self._entries[unit, sample])
        self._next += 1
        self._entries[unit, sample] = _Entry(self._next, json.dumps(_encode(output)))

    def get(self, unit: str, sample: int) -> Any:
        """A stored output, in fresh tensors with the strides and on the device they had.

        Raises:
            CalibrationError: it was never stored, or was dropped.
        """
        entry = self._entries.get((unit, sample))
        if entry is None or not entry.kept:
            raise CalibrationError(
                f"the output of {unit} for sample {sample} is not stored; run every sample through a finished stage "
                "with store=True before the next stage"
            )
        tensors = iter(_stored(entry))
        return _decode(json.loads(entry.outline), lambda spec: _unpack(spec, next(tensors)))

    def placeholder(self, unit: str, sample: int, *, dense: bool) -> Any:
        """An output of NaN in the place of one that nothing reads.

        Args:
            unit: its name.
            sample: its index.
            dense: with memory of its own, so that it can be changed in place and looked at in every way; otherwise each
                tensor is one NaN, expanded.

        Raises:
            CalibrationError: the output was never stored, or holds tensors that cannot be NaN.
        """
        entry = self._entries.get((unit, sample))
        if entry is None:
            raise CalibrationError(f"{unit} has not run for sample {sample}; run every sample through every stage")

        def nan(spec: dict[str, Any]) -> Tensor:
            dtype = DTYPES[spec["dtype"]]
            if not dtype.is_floating_point:
                raise CalibrationError(f"{unit} returns a tensor of {dtype}, for which there is no placeholder")
            value = torch.tensor(torch.nan, device=spec["device"]).to(dtype)
            return _unpack(spec, value) if dense else value.expand(spec["shape"])

        return _decode(json.loads(entry.outline), nan)

    def drop(self, unit: str) -> None:
        """Forget the values of a unit's outputs."""
        for (owner, _), entry in self._entries.items():
            if owner == unit:
                self._forget(entry)

    def save(self, directory: Path) -> None:
        """Make everything durable in a directory that did not hold a cache before.

        What an earlier call wrote is linked instead of written again, where that directory still exists.

        Raises:
            ExportError: the disk is full.
        """
        directory.mkdir(parents=True, exist_ok=True)
        rows = []
        for unit in dict.fromkeys(owner for owner, _ in self._entries):
            self._save_unit(unit, directory)
        for (unit, sample), entry in self._entries.items():
            file = entry.saved.name if entry.kept and entry.saved is not None else None
            row = {"unit": unit, "sample": sample, "number": entry.number, "file": file}
            rows.append(row | {"outline": entry.outline})
        try:
            write_json(directory / _INDEX, {"next": self._next, "outputs": rows})
            sync_tree(directory)
        except OSError as error:
            raise ExportError(f"{directory}: could not be written: {error}; make room and go on") from error

    def restore_(self, directory: Path) -> None:
        """Take over what :meth:`save` wrote, in place of what is here; ``directory`` may be deleted afterwards.

        Raises:
            CalibrationError: there is no saved cache.
            CheckpointError: a file is damaged.
            ExportError: the disk is full.
        """
        if not (directory / _INDEX).is_file():
            raise CalibrationError(f"{directory}: no stored outputs (it has no {_INDEX})")
        index = read_json(directory / _INDEX)
        for entry in self._entries.values():
            self._forget(entry)
        self._entries, self._next = {}, index["next"]
        for row in index["outputs"]:
            entry = _Entry(row["number"], row["outline"])
            self._entries[row["unit"], row["sample"]] = entry
            if row["file"] is not None:
                entry.saved = directory / row["file"]
                self._keep(entry, list(_read(entry.saved, entry.number)))

    def _keep(self, entry: _Entry, tensors: list[Tensor]) -> None:
        entry.tensors = tensors
        entry.nbytes = sum(tensor.nbytes for tensor in tensors)
        if self._spill is None or self._limit is None or self._in_memory + entry.nbytes <= self._limit:
            self._in_memory += entry.nbytes
            return
        self._spill.mkdir(parents=True, exist_ok=True)
        entry.spilled = self._spill / _file(entry)
        _write(entry.spilled, [entry])
        entry.tensors = None
        self._spilled += entry.nbytes

    def _forget(self, entry: _Entry) -> None:
        if entry.tensors is not None:
            self._in_memory -= entry.nbytes
        if entry.spilled is not None:
            self._spilled -= entry.nbytes
            entry.spilled.unlink(missing_ok=True)
        entry.tensors = entry.spilled = entry.saved = None

    def _save_unit(self, unit: str, directory: Path) -> None:
        """One file for all of a unit's outputs that are in memory, and links for those that are in files already."""
        new = []
        for entry in (entry for (owner, _), entry in self._entries.items() if owner == unit and entry.kept):
            source = entry.saved if entry.saved is not None and entry.saved.is_file() else entry.spilled
            if source is not None and _link(source, directory / source.name):
                entry.saved = directory / source.name
            else:
                new.append(entry)
        if new:
            path = directory / _file(new[0])
            _write(path, new)
            for entry in new:
                entry.saved = path


def _file(entry: _Entry) -> str:
    return f"{entry.number:08d}.safetensors"


def _link(source: Path, target: Path) -> bool:
    """Whether ``target`` is now another name of ``source``."""
    try:
        if not target.exists():
            os.link(source, target)
    except OSError:
        return False  # another file system, or one without links
    return True


def _write(path: Path, entries: list[_Entry]) -> None:
    tensors = {f"{entry.number}.{index}": tensor for entry in entries for index, tensor in enumerate(_stored(entry))}
    write_tensor_file(path, tensors)


def _stored(entry: _Entry) -> Iterator[Tensor]:
    if entry.tensors is not None:
        yield from entry.tensors
    else:
        assert entry.spilled is not None
        yield from _read(entry.spilled, entry.number)


def _read(path: Path, number: int) -> Iterator[Tensor]:
    """The tensors of one output out of a file that may hold more."""
    with TensorFiles.open([path]) as files:
        index = 0
        while (name := f"{number}.{index}") in files:
            yield files.read(name)
            index += 1


def _tensors(value: Any) -> Iterator[Tensor]:
    """In the order of :func:`_encode`."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, CONTAINERS):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _encode(value: Any) -> dict[str, Any]:
    """The outline of a nest as JSON values."""
    if isinstance(value, Tensor):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "stride": list(value.stride()) if _can_be_laid_out(value) else None,
            "device": str(value.device),
        }
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item) for item in value]}
    return {"value": value}


def _decode(outline: dict[str, Any], tensor: Any) -> Any:
    match outline:
        case {"dtype": _}:
            return tensor(outline)
        case {"dict": items}:
            return {key: _decode(item, tensor) for key, item in items}
        case {"list": items}:
            return [_decode(item, tensor) for item in items]
        case {"tuple": items}:
            return tuple(_decode(item, tensor) for item in items)
    return outline["value"]


def _can_be_laid_out(tensor: Tensor) -> bool:
    """Whether no two elements share memory, but for expanded dimensions."""
    extent = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride and size > 1:
            if stride < extent:
                return False
            extent += stride * (size - 1)
    return True


def _pack(tensor: Tensor) -> Tensor:
    """A private contiguous copy on the CPU; expanded dimensions are stored once."""
    tensor = tensor.detach()
    for dim, (stride, size) in enumerate(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def _unpack(spec: dict[str, Any], values: Tensor) -> Tensor:
    """A new tensor as the outline says, also in its strides: kernels choose by them, and the last bit follows."""
    shape, stride, dtype = spec["shape"], spec["stride"], DTYPES[spec["dtype"]]
    if stride is None:
        return torch.empty(shape, dtype=dtype, device=spec["device"]).copy_(values)
    stored = [1 if step == 0 and size > 1 else size for size, step in zip(shape, stride, strict=True)]
    tensor = torch.empty_strided(stored, stride, dtype=dtype, device=spec["device"]).copy_(values)
    return tensor if stored == shape else tensor.expand(shape)
