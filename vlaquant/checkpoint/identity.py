"""Which weights these are: SHA-256 sums, computed in parallel."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vlaquant.checkpoint.directory import read_config, weight_files
from vlaquant.checkpoint.tensor_writing import INDEX

_PIECE_BYTES = 4 * 2**20
_MAX_THREADS = 8


def sha256(path: Path) -> str:
    """SHA-256 sum of a file, hexadecimal; 4 MiB of memory whatever its size."""
    total = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            total.update(buffer[:count])
    return total.hexdigest()


def sha256_all(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> sum, several files at a time: hashlib lets other threads run while it computes."""
    files = list(paths)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, _MAX_THREADS)) as pool:
        sums = pool.map(sha256, files)
        return dict(zip((path.name for path in files), sums, strict=True))


def source_identity(directory: Path, also: Iterable[str] = ()) -> dict[str, str]:
    """File name -> SHA-256 of everything that decides a model's weights: config.json, the index, the weight files.

    ``also`` names more files, which are left out where they do not exist.

    Raises:
        CheckpointError: what :func:`read_config` and :func:`weight_files` raise.
    """
    read_config(directory)
    index = directory / INDEX
    more = [directory / name for name in also if (directory / name).is_file()]
    files = [directory / "config.json", *([index] if index.is_file() else []), *weight_files(directory), *more]
    return sha256_all(dict.fromkeys(files))
