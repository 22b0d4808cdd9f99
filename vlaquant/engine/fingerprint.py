"""What a run depends on, as plain values that can be stored and compared with those of a later run."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    head = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    if flat.numel():
        head.update(flat.view(torch.uint8).numpy().data)
    return head.hexdigest()


def fingerprint(samples: Iterable[Any]) -> str | None:
    """SHA-256 over calibration samples; None if one holds an object whose content vlaquant cannot see.

    Known are tensors, arrays, images, numbers, text, None, and lists, tuples, mappings and dataclasses of them.
    """
    hasher = hashlib.sha256()
    try:
        for sample in samples:
            _add(hasher, sample)
    except TypeError:
        return None
    return hasher.hexdigest()


def _add(hasher: Any, value: Any) -> None:
    hasher.update(type(value).__name__.encode() + b"(")
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_meta or value.is_nested or value.is_quantized:
            raise TypeError(f"a tensor of layout {value.layout} on {value.device}")
        hasher.update(digest(value).encode())
    elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
        hasher.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Image.Image):
        # The bytes of an image with a palette are numbers of colours
        hasher.update(f"{value.mode}{value.size}{value.getpalette()}".encode() + value.tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            _add(hasher, key)
            _add(hasher, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _add(hasher, item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _add(hasher, getattr(value, field.name))
    elif value is None or isinstance(value, str | bytes | bool | int | float | np.generic):
        hasher.update(repr(value).encode())
    else:
        raise TypeError(type(value).__name__)
    hasher.update(b")")


def first_difference(mine: Any, theirs: Any, where: str = "") -> str | None:
    """The first place in which two nests of plain values differ, with both values; None if they are equal."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for key in [*mine, *(key for key in theirs if key not in mine)]:
            there = f"{where}.{key}" if where else str(key)
            if key not in mine or key not in theirs:
                return f"{there}: {_short(mine.get(key, 'absent'))} now, {_short(theirs.get(key, 'absent'))} then"
            found = first_difference(mine[key], theirs[key], there)
            if found is not None:
                return found
        return None
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        found_in = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(mine, theirs, strict=True)))
        return next((found for found in found_in if found is not None), None)
    return None if mine == theirs else f"{where}: {_short(mine)} now, {_short(theirs)} then"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def package_versions() -> dict[str, str]:
    """Versions of what makes a checkpoint, for its manifest and for the identity of a run."""
    packages = {}
    for package in ("vlaquant", "torch", "transformers", "safetensors", "compressed-tensors"):
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "not installed"
    return packages
