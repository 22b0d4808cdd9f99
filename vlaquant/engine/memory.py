"""What a process holds without using it."""

import ctypes
import sys


def return_free_memory() -> None:
    """Hand freed memory back to the system.

    glibc keeps what is freed for later requests. Samples, Hessians and blocks are of many sizes, so that little of it
    fits the next request, and the process would grow from stage to stage. Other C libraries have no such call.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
