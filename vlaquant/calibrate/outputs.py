"""What a block may return and still be answered from a cache: tensors and plain values in tuples, lists and dicts."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PLAIN = (type(None), bool, int, float, str)
CONTAINERS = (tuple, list, dict)

#: By the names that the cache's files use.
DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a nest of tuples, lists and dicts of any kind."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def objection(value: Any) -> str | None:
    """Why an output cannot be stored and given back exactly as it was, or None if it can."""
    kind = type(value)
    if kind is Tensor:
        stored = value.layout is torch.strided and not value.is_nested and value.dtype in DTYPES.values()
        return None if stored else f"a tensor of layout {value.layout} and {value.dtype}"
    if kind in PLAIN:
        return None
    if kind not in CONTAINERS:
        return f"a {kind.__name__}"
    if kind is dict and not all(type(key) in (str, int) for key in value):
        return "a dict with keys that are neither str nor int"
    items = value.values() if kind is dict else value
    return next((found for found in map(objection, items) if found is not None), None)


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest, made anew, with every tensor changed; ``value`` is one that has no :func:`objection`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(item, change) for item in value)
    return value
