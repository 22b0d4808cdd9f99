"""What a kernel is, and what it is given. Kernels are plain values; :mod:`vlaquant.kernels` chooses among them.

Letters: n out, k in, g groups, t tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlaquant.numerics import QuantizedWeight, quantize_tokens, to_codes
from vlaquant.packing import unpack_columns, unpack_rows
from vlaquant.scheme import Granularity, QuantSpec, Scheme


@dataclass(frozen=True, slots=True)
class Query:
    """All that the choice of a kernel may depend on.

    Attributes:
        scheme: how the layer is stored and run.
        in_features: k.
        out_features: n.
        dtype: of the activations.
        device: type of the device, such as ``cpu`` or ``cuda``.
    """

    scheme: Scheme
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: str


class Stored(NamedTuple):
    """The tensors of a layer, as they stand in the file.

    Attributes:
        weight: packed int32 [n, ceil(k * bits / 32)], or codes int8 [n, k].
        scale: [n, g]; [1] per tensor.
        zero: int8 as ``scale``, or packed int32 [ceil(n * bits / 32), g]; None if symmetric.
        input_scale: [1], for static activations.
        input_zero: int8 [1], for static asymmetric activations.
        bias: [n].
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    input_scale: Tensor | None
    input_zero: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to compute ``x @ W.T + bias`` from a stored weight.

    Attributes:
        name: what recipes, reports and ``explain`` call it.
        why_not: the reason why it cannot be used, or None if it can.
        prepare: makes the layout that it reads, once a layer; an empty tuple if it reads what is stored.
        run: (x [t, k] with t >= 1, stored, prepared, query) -> [t, n] in the dtype of x.
        restore: codes int8 [n, k] from ``prepared``. Where there is such a function, ``run`` does without
            ``stored.weight``, one layout serves all dtypes, and the layer does not hold the stored weight beside it.
    """

    name: str
    why_not: Callable[[Query], str | None]
    prepare: Callable[[Stored, Query], tuple[Tensor, ...]]
    run: Callable[[Tensor, Stored, tuple[Tensor, ...], Query], Tensor]
    restore: Callable[[tuple[Tensor, ...], Query], Tensor] | None = None


def unpack(stored: Stored, query: Query) -> QuantizedWeight:
    """The weight as plain codes, scale [n, g] and zero [n, g], whichever layout it is stored in."""
    spec = query.scheme.weight
    codes, scale, zero = stored.weight, stored.scale, stored.zero
    if codes.dtype == torch.int32:
        codes = unpack_rows(codes, spec.bits, query.in_features)
    if zero is not None and zero.dtype == torch.int32:
        zero = unpack_columns(zero, spec.bits, query.out_features)
    if spec.granularity is Granularity.TENSOR:
        scale = scale.reshape(1, 1)
        zero = None if zero is None else zero.reshape(1, 1)
    return QuantizedWeight(codes=codes, scale=scale, zero=zero, spec=spec)


def quantize_input(x: Tensor, stored: Stored, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Activations x [t, k] as codes int8 [t, k], with float32 scale and zero of [t, 1] (dynamic) or [1] (static)."""
    if spec.dynamic:
        return quantize_tokens(x, spec)
    assert stored.input_scale is not None
    # A cast to a narrow dtype can have made the scale zero
    scale = stored.input_scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny)
    zero = torch.zeros_like(scale) if stored.input_zero is None else stored.input_zero.to(torch.float32)
    return to_codes(x, scale, zero, spec).to(torch.int8), scale, zero
