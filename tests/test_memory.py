"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path

import pytest
import torch

from vlaquant.engine.memory import return_free_memory

_MIB = 2**20


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * 4096


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc keeps freed memory"
)
def test_what_lies_free_between_live_tensors_is_returned() -> None:
    # Small enough to lie in the heap; those that live on keep the heap's end where it is
    tensors = [torch.ones(25_000) for _ in range(1000)]
    living = tensors[::10]
    del tensors[:]
    held = resident()
    return_free_memory()
    assert held - resident() > 50 * _MIB
    assert all(tensor.sum() == 25_000 for tensor in living)
