"""The compiled library: where it is, what it can do here, and its one function.

It is a plain C library (``vlaquant/kernels/native/*.c``), built when the package is installed if there is a C compiler.
Its threads are those of the OpenMP runtime that torch has loaded, so that the two never compete for the cores.
"""

import ctypes
import os
import re
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vlaquant.errors import VlaquantError

_ABI = 2
_VARIABLE = "VLAQUANT_ISA"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OPENMP = re.compile(r"(/\S*lib(?:gomp|iomp5|omp)\b[^\s/]*\.(?:so|dylib)\S*)$", re.MULTILINE)


class LayerStruct(ctypes.Structure):
    """``vq_layer`` of layer.h, field by field."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("input_scale", ctypes.c_float),
        ("input_zero", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Library:
    """The loaded library.

    Attributes:
        path: of the file.
        linear: its function ``vq_linear``.
        use: its function ``vq_use``, which switches to another instruction set by its name.
        instruction_sets: that it was compiled for and that run here, the fastest first.
        instruction_set: the one in use.
        threads: whether it shares torch's threads; otherwise it computes with one.
    """

    path: Path
    linear: Any
    use: Any
    instruction_sets: tuple[str, ...]
    instruction_set: str
    threads: bool


@lru_cache(maxsize=1)
def find_library() -> Library | str:
    """The library, or why there is none.

    Raises:
        VlaquantError: the environment variable VLAQUANT_ISA names an instruction set that is not there.
    """
    path = Path(__file__).with_name(f"_kernels{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists():
        return "was not built: install a C compiler (on Debian and Ubuntu: apt install gcc), then vlaquant again"
    try:
        return open_library(path)
    except OSError as error:
        return f"does not load: {error}"


def open_library(path: Path) -> Library:
    """Load a library that was built from these sources.

    Raises:
        OSError: the system cannot load it, or it was built from other sources.
        VlaquantError: as :func:`find_library`.
    """
    loaded = ctypes.CDLL(str(path))
    loaded.vq_set_name.restype = ctypes.c_char_p
    if loaded.vq_abi() != _ABI:
        raise OSError(f"{path.name} was built from other sources; install vlaquant again")
    names: list[str] = []
    while (name := loaded.vq_set_name(len(names))) is not None:
        names.append(name.decode())
    here = tuple(name for number, name in enumerate(names) if loaded.vq_set_runs_here(number))
    chosen = os.environ.get(_VARIABLE, here[0])
    if not loaded.vq_use(chosen.encode()):
        raise VlaquantError(
            f"the environment variable {_VARIABLE}={chosen!r} is none of {', '.join(here)}, which run here"
        )
    parallel = _openmp()
    if parallel is not None:
        loaded.vq_set_parallel(parallel)
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    linear = loaded.vq_linear
    linear.argtypes = [pointer, pointer, size, size, number, pointer, number, pointer, number, number]
    return Library(path, linear, loaded.vq_use, here, chosen, parallel is not None)


def _openmp() -> Any:
    """GOMP_parallel of the OpenMP runtime in this process; None if there is none that has it."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    for path in dict.fromkeys(_OPENMP.findall(maps)):
        function = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return None


def multiply(
    function: Any, x: torch.Tensor, layer: torch.Tensor, bias: torch.Tensor | None, rows: int, *, integer: bool
) -> torch.Tensor:
    """The product of x [t, k] and the weight of ``layer`` (a ``vq_layer`` as bytes): [t, rows].

    Raises:
        MemoryError: there is none for the packed activations.
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None and (bias.dtype not in _DTYPES or not bias.is_contiguous()):
        bias = bias.to(torch.float32).contiguous()
    y = x.new_empty(x.shape[0], rows)
    failed = function(
        layer.data_ptr(),
        x.data_ptr(),
        x.shape[0],
        x.stride(0),
        _DTYPES[x.dtype],
        None if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        y.data_ptr(),
        torch.get_num_threads(),
        integer,
    )
    if failed:
        raise MemoryError(f"no memory for the activations of {x.shape[0]} tokens")
    return y
