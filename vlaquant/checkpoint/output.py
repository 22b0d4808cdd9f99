"""A directory that appears whole or not at all, and what is copied into it."""

import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from vlaquant.checkpoint.directory import PARTIAL, side_files
from vlaquant.checkpoint.identity import sha256
from vlaquant.checkpoint.syncing import sync_tree
from vlaquant.errors import ExportError


def copy_side_files(source: Path, target: Path, without: Collection[Path] = ()) -> dict[str, str]:
    """Copy them byte for byte, but for the files ``without``; returns their SHA-256 sums."""
    sums = {}
    for path in side_files(source):
        if source / path in without:
            continue
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, target / path)
        sums[str(path)] = sha256(target / path)
    return sums


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
    # What killed runs left behind; "old-" is an earlier output, which is not ours to delete
    for stale in target.parent.glob(f".{target.name}{PARTIAL}[0-9a-f]*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial = target.parent / f".{target.name}{PARTIAL}{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        sync_tree(partial)
        replace_directory(target, partial)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{target}: could not be written, and nothing was: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(target: Path, complete: Path) -> None:
    """Rename ``complete`` to ``target``; an old ``target`` steps aside first and goes last."""
    old = target.parent / f".{target.name}{PARTIAL}old-{uuid.uuid4().hex[:8]}"
    if target.exists():
        target.rename(old)
    try:
        complete.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
