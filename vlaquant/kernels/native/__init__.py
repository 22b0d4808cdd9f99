"""Kernels in C, for CPUs: exact products of packed weights, with the vector instructions that the CPU has.

``native`` multiplies float activations with weights of 2 to 8 bits, summed in float32; ``native_int8`` rounds
activations to int8 and sums integers. Both take any number of rows, columns and tokens, and groups of any size.
A token with a NaN or an infinity gives no finite result (with float activations what IEEE 754 says for each product and
sum, with int8 activations NaN); other tokens do not see it.
"""

from typing import Any, cast

import torch
from torch import Tensor

from vlaquant.kernels.base import Kernel, Query, Stored, unpack
from vlaquant.kernels.native.layout import make_layout, read_codes
from vlaquant.kernels.native.library import Library, find_library, multiply

__all__ = ["NATIVE", "NATIVE_INT8"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Beyond, products of 255 · 128 can overflow the int32 that they are summed in.
_INT32_COLUMNS = (2**31 - 1) // (255 * 128)


def _why_not(query: Query) -> str | None:
    if query.device != "cpu":
        return f"runs on cpu, not on {query.device}"
    if query.dtype not in _DTYPES:
        return f"takes activations of float32, bfloat16 or float16, not {query.dtype}"
    found = find_library()
    return found if isinstance(found, str) else None


def _float_why_not(query: Query) -> str | None:
    if query.scheme.activation is not None:
        return "is weight-only, and the scheme has int8 activations"
    return _why_not(query)


def _int8_why_not(query: Query) -> str | None:
    activation = query.scheme.activation
    if activation is None:
        return "needs int8 activations, and the scheme is weight-only"
    if activation.dynamic and not activation.symmetric:
        return "has no zero point per token"
    if query.in_features > _INT32_COLUMNS:
        return f"could overflow int32 with in_features={query.in_features}, more than {_INT32_COLUMNS}"
    return _why_not(query)


def _prepare(stored: Stored, query: Query) -> tuple[Tensor, ...]:
    scale = 0.0
    if stored.input_scale is not None:  # a cast to a narrow dtype can have made it zero
        scale = float(stored.input_scale.float().clamp(min=torch.finfo(torch.float32).tiny))
    zero = None if stored.input_zero is None else int(stored.input_zero)
    return make_layout(unpack(stored, query), input_scale=scale, input_zero=zero)


# An operator, because a compiler cannot look into the library
torch.library.define(
    "vlaquant::native_linear", "(Tensor x, Tensor layer, Tensor weight, Tensor? bias, int rows, bool integer) -> Tensor"
)


@torch.library.impl("vlaquant::native_linear", "CompositeExplicitAutograd")
def _linear(x: Tensor, layer: Tensor, weight: Tensor, bias: Tensor | None, rows: int, integer: bool) -> Tensor:  # noqa: FBT001
    """``weight`` is read through the address in ``layer``."""
    return multiply(_loaded().linear, x, layer, bias, rows, integer=integer)


@torch.library.register_fake("vlaquant::native_linear")  # type: ignore[untyped-decorator]
def _linear_shape(x: Tensor, layer: Tensor, weight: Tensor, bias: Any, rows: int, integer: bool) -> Tensor:  # noqa: FBT001
    return x.new_empty(x.shape[0], rows)


def _loaded() -> Library:
    return cast("Library", find_library())  # why_not has seen that it is there


def _run(x: Tensor, stored: Stored, prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    layer, weight = prepared[:2]
    integer = query.scheme.activation is not None
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.vlaquant.native_linear(x, layer, weight, stored.bias, query.out_features, integer)
        return y
    return multiply(_loaded().linear, x, layer, stored.bias, query.out_features, integer=integer)


def _restore(prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    weight = query.scheme.weight
    n, k = query.out_features, query.in_features
    return read_codes(prepared[1], n, k, weight.group_size or k, weight.bits)


NATIVE = Kernel("native", _float_why_not, _prepare, _run, _restore)
NATIVE_INT8 = Kernel("native_int8", _int8_why_not, _prepare, _run, _restore)
