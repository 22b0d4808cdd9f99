"""The kernel that is obviously right, runs everywhere and is in no hurry. All others are measured against it.

It unpacks the weight at every call and keeps nothing. A float activation meets the float weight in ``F.linear``; int8
activations are multiplied as float64, which holds every product and sum of codes exactly.
"""

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.kernels.base import Kernel, Query, Stored, quantize_input, unpack


def _why_not(_query: Query) -> str | None:
    return None


def _prepare(_stored: Stored, _query: Query) -> tuple[Tensor, ...]:
    return ()


def _run(x: Tensor, stored: Stored, _prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    weight = unpack(stored, query)
    spec = query.scheme.activation
    if spec is None:
        bias = None if stored.bias is None else stored.bias.to(x.dtype)
        return functional.linear(x, weight.dequantize(x.dtype), bias)
    codes, scale, zero = quantize_input(x, stored, spec)
    y = scale.double() * ((codes.double() - zero.double()) @ weight.dequantize(torch.float64).T)
    if stored.bias is not None:
        y = y + stored.bias.double()
    return y.to(x.dtype)


REFERENCE = Kernel("reference", _why_not, _prepare, _run)
