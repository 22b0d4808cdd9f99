"""What the Triton kernels share: when they can run, and which block sizes they run with.

**Block sizes.** A kernel offers a short list of :class:`Config`, the first of which needs no measurement. The first
call for a shape, dtype and bucket of tokens times them all; the winner is kept in memory and in a JSON file of the
user's cache folder. Nothing is timed while a CUDA graph is captured, under the interpreter, or with
``VLAQUANT_AUTOTUNE=0`` in the environment: an unknown shape then gets the first of the list. So call a layer once with
as many tokens as the graph has before capturing it; that also compiles the kernels.

**Interpreter.** With ``TRITON_INTERPRET=1`` in the environment when Triton is first imported, the kernels run on the
CPU, one instance after the other. Slow, but it needs no GPU, and so the tests are done with it.
"""

from __future__ import annotations  # Triton reads annotations as text, and there may be no Triton

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "Config",
    "bucket",
    "cache_file",
    "choose",
    "dot_dtype",
    "jit",
    "on_device_of",
    "output_dtype",
    "split_to_fill",
    "tl",
    "triton",
    "why_not_here",
]

#: Whether kernels are interpreted on the CPU. Triton decides it for good when it is imported.
INTERPRETED: bool = triton is not None and bool(triton.knobs.runtime.interpret)

_OLDEST = (8, 0)  # NVIDIA's first generation with bfloat16 and int8 in the tensor cores that Triton compiles for
_SWITCH = "VLAQUANT_AUTOTUNE"
_WARMUP_MS, _MEASURED_MS = 5, 20


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function as it is, which nobody calls."""
    return function if triton is None else triton.jit(function)


def why_not_here(device: str) -> str | None:
    """Why no Triton kernel can run on that type of device, or None."""
    if device != ("cpu" if INTERPRETED else "cuda"):
        return f"runs on cuda, not on {device}"
    if triton is None:
        return "needs triton"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is None and capability < _OLDEST:
        return f"needs compute capability {_OLDEST[0]}.{_OLDEST[1]}, and the device has {capability[0]}.{capability[1]}"
    return None


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device_of(tensor)


def dot_dtype(dtype: torch.dtype) -> Any:
    """The dtype in which activations of ``dtype`` go into ``tl.dot``. The interpreter cannot multiply bfloat16."""
    if INTERPRETED and dtype == torch.bfloat16:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel stores. The interpreter cuts bfloat16 off where a GPU rounds, so there PyTorch rounds."""
    return torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype


@dataclass(frozen=True, slots=True)
class Config:
    """How one product is cut up.

    Attributes:
        path: which of its ways the kernel goes.
        block_n: rows of the weight an instance.
        block_m: tokens an instance.
        split: over how many instances the columns of the weight are spread (split-K).
        warps: of an instance.
        stages: how many iterations ahead loads are issued.
    """

    path: str
    block_n: int = 0
    block_m: int = 0
    split: int = 1
    warps: int = 4
    stages: int = 2


def bucket(tokens: int) -> int:
    """The power of two that numbers of tokens are tuned as: the next one."""
    return 1 << (tokens - 1).bit_length()


def split_to_fill(instances: int, steps: int, *, most: int = 16) -> int:
    """Over how many instances to spread ``steps`` of k, so that ``instances`` of them fill a large GPU some times."""
    split = 1
    while split < most and instances * split < 512 and split * 2 <= steps:  # 512: four for each of 128 processors
        split *= 2
    return split


_chosen: dict[str, Config] = {}  # as in the file
_known: dict[tuple[Hashable, ...], Config] = {}  # what this process has asked for, for a quick answer
_read: set[Path] = set()


def choose(
    key: tuple[Hashable, ...], candidates: Callable[[], Sequence[Config]], run: Callable[[Config], object]
) -> Config:
    """The fastest of ``candidates`` for ``key``; the first if it is not known and cannot be measured now.

    Args:
        key: all that the choice may depend on: kernel, shape, dtype, bucket of tokens.
        candidates: what can be chosen. A remembered choice that is none of them is forgotten.
        run: one call with a config, on the current device.
    """
    if INTERPRETED or os.environ.get(_SWITCH) == "0":
        return candidates()[0]
    here = (torch.cuda.current_device(), *key)
    if here in _known:
        return _known[here]
    configs = candidates()
    name = json.dumps([torch.cuda.get_device_name(), triton.__version__, *map(str, key)])
    _read_once()
    if _chosen.get(name) not in configs:
        if len(configs) == 1 or torch.cuda.is_current_stream_capturing():
            return configs[0]
        _chosen[name] = min(configs, key=lambda config: _milliseconds(lambda: run(config)))
        _write()
    _known[here] = _chosen[name]
    return _known[here]


def _milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call with a cold L2 cache; infinite if the device lacks the memory for it."""
    try:
        return float(triton.testing.do_bench(call, warmup=_WARMUP_MS, rep=_MEASURED_MS, return_mode="median"))
    except (triton.errors.TritonError, torch.cuda.OutOfMemoryError):
        return math.inf


def cache_file() -> Path:
    """Where choices are kept between processes."""
    folder = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(folder).expanduser() / "vlaquant" / "triton_configs.json"


def _stored_choices(path: Path) -> dict[str, Config]:
    """What the file has; nothing if it is not there or not ours. Entries of another shape are passed over."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {str(name): Config(**fields) for name, fields in entries.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _read_once() -> None:
    path = cache_file()
    if path not in _read:
        _read.add(path)
        _chosen.update({**_stored_choices(path), **_chosen})


def _write() -> None:
    """Other processes may write too: what they chose meanwhile is kept, and readers never see half a file."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = {name: dataclasses.asdict(config) for name, config in (_stored_choices(path) | _chosen).items()}
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            json.dump(entries, file, indent=0)
        Path(file.name).replace(path)
