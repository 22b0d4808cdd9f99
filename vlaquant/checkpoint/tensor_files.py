"""Single tensors out of safetensors files, in memory that is gone when the tensor is.

Why not ``safetensors.safe_open``: it maps the file, and every page that was touched counts as resident until the file
is closed. Reading 64 tensors of 32 MiB one after another (safetensors 0.8.0) grew the process from 220 to 2271 MiB;
reading each into a buffer of its own, from 220 to 254 MiB. A map also dies with SIGBUS when the file shrinks under it.
"""

import json
import math
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from vlaquant.errors import CheckpointError

#: safetensors' names of the dtypes that torch has, widest first: the order in which safetensors lays tensors out, so
#: that each starts at a multiple of its size.
DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Bytes before the header: its length, little-endian.
LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_PIECE_BYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes ``start`` to ``end`` of ``file``; if there is a ``make``, that gives it instead."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    make: Callable[[], Tensor] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    state: tuple[int, ...]


class TensorFiles(Mapping[str, TensorEntry]):
    """The tensors of several safetensors files by name, in the order of the files and of their bytes.

    All headers are read and checked when it is made. The files stay open until :meth:`close`, or until the object is
    gone, and every read makes sure that they are still those whose headers were checked. Several threads may read.
    """

    def __init__(self, entries: dict[str, TensorEntry], opened: dict[Path, _OpenFile], closing: ExitStack) -> None:
        self._entries = entries
        self._opened = opened
        self._finalizer = weakref.finalize(self, closing.close)

    @classmethod
    def open(cls, files: Sequence[Path]) -> Self:
        """Read the headers of ``files``.

        Raises:
            CheckpointError: a file that is missing, truncated or damaged, a dtype that torch has not, or one name in
                two files.
        """
        entries: dict[str, TensorEntry] = {}
        opened: dict[Path, _OpenFile] = {}
        with ExitStack() as closing:
            for path in files:
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                    closing.callback(os.close, descriptor)
                    opened[path] = _OpenFile(descriptor, _state(os.fstat(descriptor)))
                    found = _read_header(path, descriptor)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error}") from error
                twice = sorted(found.keys() & entries.keys())
                if twice:
                    raise CheckpointError(f"{path}: holds {twice[0]}, and so does {entries[twice[0]].file.name}")
                entries |= found
            return cls(entries, opened, closing.pop_all())

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        self._finalizer()
        self._opened.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> TensorEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> tuple[str, ...]:
        """All names, in the order of the files and of the bytes in them: the fastest order to read in."""
        return tuple(self._entries)

    def rename_(self, names: Mapping[str, str]) -> None:
        """Give tensors other names, {name now: new name}; those that are not in ``names`` keep theirs.

        Raises:
            CheckpointError: two tensors would get one name, and they are not the same, bit for bit.
        """
        entries: dict[str, TensorEntry] = {}
        first: dict[str, str] = {}
        for name, entry in self._entries.items():
            new = names.get(name, name)
            if new in entries and not self._same(first[new], name):
                raise CheckpointError(
                    f"{entry.file}: {first[new]} and {name} are both {new} in the model, and their values differ; "
                    "delete the one that does not belong to this checkpoint"
                )
            first.setdefault(new, name)
            entries.setdefault(new, entry)
        self._entries = entries

    def add_(self, tensors: Mapping[str, Tensor], directory: Path) -> None:
        """Take in tensors that are in none of the files; they stay in memory.

        Args:
            tensors: contiguous, on the CPU.
            directory: where they came from.

        Raises:
            CheckpointError: a file holds one of that name.
        """
        twice = sorted(tensors.keys() & self._entries.keys())
        if twice:
            raise CheckpointError(f"{directory}: {twice[0]} lies in the weights and beside them; delete one of them")
        for name, tensor in tensors.items():
            entry = TensorEntry(directory / name, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, tensor.clone)
            self._entries[name] = entry

    def derive_(self, made: Mapping[str, tuple[Sequence[str], Callable[..., Tensor]]]) -> None:
        """Let tensors be computed whenever they are read, instead of being what lies in the files.

        Args:
            made: {name, known or new: (tensors as they were before this call, what to do with them)}. The result is on
                the CPU, with dtype and shape of the first of these tensors.
        """
        before = dict(self._entries)
        for name, (sources, function) in made.items():
            entries = [before[source] for source in sources]
            self._entries[name] = replace(entries[0], make=self._computed(entries, function))

    def _computed(self, entries: Sequence[TensorEntry], function: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: function(*(self._read(entry) for entry in entries))

    def _same(self, one: str, other: str) -> bool:
        if (self[one].dtype, self[one].shape) != (self[other].dtype, self[other].shape):
            return False
        return all(a == b for a, b in zip(self.pieces(one), self.pieces(other), strict=True))

    @property
    def bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.end - entry.start for entry in self._entries.values())

    def read(self, name: str) -> Tensor:
        """The tensor, contiguous, in memory of its own.

        Raises:
            CheckpointError: the file changed since it was opened, or cannot be read.
        """
        return self._read(self[name])

    def _read(self, entry: TensorEntry) -> Tensor:
        if entry.make is not None:
            return entry.make()
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._fill(entry, entry.start, tensor_bytes(tensor))
        self._check_unchanged(entry.file)
        return tensor

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in pieces of at most 8 MiB; each is overwritten by the next.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        entry = self[name]
        if entry.make is not None:
            whole = tensor_bytes(entry.make().contiguous())
            yield from (whole[start : start + _PIECE_BYTES] for start in range(0, len(whole), _PIECE_BYTES))
            return
        buffer = memoryview(bytearray(min(_PIECE_BYTES, entry.end - entry.start)))
        for start in range(entry.start, entry.end, _PIECE_BYTES):
            piece = buffer[: entry.end - start]
            self._fill(entry, start, piece)
            yield piece
        self._check_unchanged(entry.file)

    def _fill(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        if entry.file not in self._opened:
            raise CheckpointError(f"{entry.file}: was closed; open the files again")
        descriptor = self._opened[entry.file].descriptor
        done = 0
        try:
            while done < len(buffer):  # Linux reads at most 2 GiB a call
                count = os.preadv(descriptor, [buffer[done:]], start + done)
                if count == 0:
                    self._check_unchanged(entry.file)
                    raise CheckpointError(f"{entry.file}: ends before byte {entry.end}, it may be truncated")
                done += count
        except OSError as error:
            raise CheckpointError(f"{entry.file}: cannot be read: {error}") from error

    def _check_unchanged(self, path: Path) -> None:
        try:
            now = _state(path.stat())
        except OSError as error:
            raise CheckpointError(f"{path}: changed while it was being read: {error}") from error
        if now != self._opened[path].state:
            raise CheckpointError(
                f"{path}: changed while it was being read (size, time or file is not what it was when it was opened); "
                "let the other program finish, then start again"
            )


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _state(stat: os.stat_result) -> tuple[int, ...]:
    """What differs when a file was written to or replaced."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _read_header(path: Path, descriptor: int) -> dict[str, TensorEntry]:
    """Entries of one file, in the order of their bytes, which they cover without gap or overlap."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, LENGTH_BYTES, 0), "little")
    first = LENGTH_BYTES + length
    if size < LENGTH_BYTES or (length <= _MAX_HEADER_BYTES and size < first):
        raise CheckpointError(f"{path}: truncated: {size} bytes, which end inside the header")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: damaged header: it claims {length} bytes; truncated, or no safetensors file")
    header = _parse(path, os.pread(descriptor, length, LENGTH_BYTES))
    header.pop("__metadata__", None)
    unordered = {name: _entry(path, name, data, first) for name, data in header.items()}
    entries = dict(sorted(unordered.items(), key=lambda item: (item[1].start, item[1].end)))
    end = first
    for name, entry in entries.items():
        if entry.start != end:
            kind = "overlaps the tensor before it" if entry.start < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: damaged header: {name} {kind}")
        end = entry.end
    if size != end:
        kind = "truncated" if size < end else "damaged"
        raise CheckpointError(f"{path}: {kind}: {size} bytes, but its header describes {end}")
    return entries


def _parse(path: Path, data: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        header = json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: damaged header: holds {type(header).__name__}, wanted an object")
    return header


def _entry(path: Path, name: str, data: Any, first: int) -> TensorEntry:
    """``data`` of the header as an entry; ``first`` is the offset of the first tensor byte."""
    where = f"{path}: damaged header: {name}"
    if not isinstance(data, dict) or not {"dtype", "shape", "data_offsets"} <= data.keys():
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = data["dtype"], data["shape"], data["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} has dtype {dtype!r}; vlaquant reads {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        # `type(...) is int`, as true and false would pass for 1 and 0
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise CheckpointError(f"{where} has shape {shape} at {offsets}; wanted lists of integers from 0 up")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != wanted:
        raise CheckpointError(f"{where} of shape {shape} and dtype {dtype} needs {wanted} bytes, but lies at {offsets}")
    return TensorEntry(path, DTYPES[dtype], tuple(shape), first + offsets[0], first + offsets[1])
