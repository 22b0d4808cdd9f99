"""Which code computes a packed layer, and why not another.

The kernels are listed in order of preference, and the first that has no objection runs. The last, ``reference``, never
has one, so that a layer always runs; whether it runs fast is what :func:`explain` is for.

``VLAQUANT_KERNEL=reference`` in the environment keeps all others from being chosen. It is read when a layer first runs
with a dtype, and after the layer has moved.
"""

import os

from vlaquant.errors import VlaquantError
from vlaquant.kernels.base import Kernel, Query, Stored, quantize_input, unpack
from vlaquant.kernels.native import NATIVE, NATIVE_INT8
from vlaquant.kernels.reference import REFERENCE
from vlaquant.kernels.torch_cpu import INT4PACK, ONEDNN_INT8
from vlaquant.kernels.triton_w4a16 import TRITON_W4A16
from vlaquant.kernels.triton_w8a8 import TRITON_W8A8

__all__ = ["KERNELS", "Kernel", "Query", "Stored", "explain", "quantize_input", "select_kernel", "unpack"]

#: In order of preference.
KERNELS: tuple[Kernel, ...] = (
    NATIVE,
    NATIVE_INT8,
    INT4PACK,
    ONEDNN_INT8,
    TRITON_W4A16,
    TRITON_W8A8,
    REFERENCE,
)

_VARIABLE = "VLAQUANT_KERNEL"


def select_kernel(query: Query) -> Kernel:
    """The first kernel that can compute such a layer.

    Raises:
        VlaquantError: the environment variable names something else than the reference kernel.
    """
    reasons = explain(query)
    return next(kernel for kernel, (_, reason) in zip(KERNELS, reasons, strict=True) if reason is None)


def explain(query: Query) -> list[tuple[str, str | None]]:
    """For every kernel in order of preference: its name, and why it cannot compute such a layer (None if it can).

    Raises:
        VlaquantError: as :func:`select_kernel`.
    """
    if _reference_is_forced():
        forced = f"{_VARIABLE}={REFERENCE.name} is set"
        return [(kernel.name, None if kernel is REFERENCE else forced) for kernel in KERNELS]
    return [(kernel.name, kernel.why_not(query)) for kernel in KERNELS]


def _reference_is_forced() -> bool:
    name = os.environ.get(_VARIABLE, "")
    if name not in {"", REFERENCE.name}:
        raise VlaquantError(
            f"the environment variable {_VARIABLE}={name!r} names no kernel that can be forced; "
            f"unset it or use {REFERENCE.name!r}"
        )
    return name == REFERENCE.name
