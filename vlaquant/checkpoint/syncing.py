"""Nothing counts as written before it is on the disk: files first, then the directory entries that name them."""

import os
from pathlib import Path


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries, so that a rename in it survives a power cut."""
    _flush(directory)


def sync_tree(directory: Path) -> None:
    """Flush every file and every directory below, and the directory itself."""
    for path in [*directory.rglob("*"), directory]:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
