"""A weight as the native kernels read it; the picture is in layer.h.

Letters: n out, k in, g groups, b blocks of 32 rows, p columns of a group, padded.
"""

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.kernels.native.library import LayerStruct
from vlaquant.numerics import QuantizedWeight
from vlaquant.scheme import Granularity

_ROWS = 32
_PAD = 8


class Layout(NamedTuple):
    """What one layer holds for the kernels; ``layer`` has the addresses of the others, which must live as long.

    Attributes:
        layer: uint8, the bytes of a ``vq_layer``.
        weight: uint8 [b, g, p * bits / 8, 32].
        scale: float32 [b, g, 32].
        shift: float32 [b, g, 32], zero times scale; empty if symmetric.
        offset: int32 [b, g, 32], zero + 2^(bits-1); empty if symmetric.
        sums: int32 [b, g, 32], codes less zero, summed; empty unless static activations have a zero point.
    """

    layer: Tensor
    weight: Tensor
    scale: Tensor
    shift: Tensor
    offset: Tensor
    sums: Tensor


def make_layout(weight: QuantizedWeight, *, input_scale: float = 0.0, input_zero: int | None = None) -> Layout:
    """Re-lay a weight of 2 to 8 bits; up to 4 bits are stored in 4, others in 8.

    Args:
        weight: codes [n, k] with scales per tensor, channel or group.
        input_scale: of static activations; 0 if each token has its own.
        input_zero: their zero point; None if symmetric.
    """
    n, k = weight.codes.shape
    bits = 4 if weight.spec.bits <= 4 else 8
    group = weight.spec.group_size or k
    scale, zero = (_per_row(values, n, weight) for values in (weight.scale, weight.zero))
    assert scale is not None
    codes = weight.codes.reshape(n, k // group, group)
    shift = offset = sums = torch.empty(0)
    if zero is not None:
        shift = _blocks(zero.float() * scale.float())
        offset = _blocks(zero.int() + (1 << (bits - 1)))
    if input_zero is not None:
        total = codes.sum(dim=-1, dtype=torch.int32)
        sums = _blocks(total if zero is None else total - zero.int() * group)
    tensors = [_words(codes, bits), _blocks(scale.float()), shift, offset, sums]
    struct = LayerStruct(n, k, group, bits, *(one.data_ptr() or None for one in tensors), input_scale, input_zero or 0)
    layer = torch.frombuffer(
        bytearray(ctypes.string_at(ctypes.addressof(struct), ctypes.sizeof(struct))), dtype=torch.uint8
    )
    return Layout(layer, *tensors)


def _per_row(values: Tensor | None, n: int, weight: QuantizedWeight) -> Tensor | None:
    """[n, g], of one for all rows as well."""
    if values is not None and weight.spec.granularity is Granularity.TENSOR:
        return values.reshape(1, 1).expand(n, 1)
    return values


def _blocks(values: Tensor) -> Tensor:
    """[n, g] -> [b, g, 32], with zeros for rows that are not there."""
    padded = functional.pad(values, (0, 0, 0, -values.shape[0] % _ROWS))
    return padded.reshape(-1, _ROWS, values.shape[1]).transpose(1, 2).contiguous()


def _words(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [n, g, p] -> uint8 [b, g, p * bits / 8, 32]: the bytes of int32 lanes, one for each row."""
    n, groups, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % _PAD, 0, 0, 0, -n % _ROWS))
    unsigned = (padded.view(torch.uint8) + (1 << (bits - 1))).reshape(-1, _ROWS, groups, padded.shape[2] // 4, 4)
    if bits == 4:
        low, high = unsigned[..., ::2, :], unsigned[..., 1::2, :]
        unsigned = low | high << 4
    words: Tensor = unsigned.permute(0, 2, 3, 1, 4).contiguous().flatten(2).unflatten(2, (-1, _ROWS))
    return words


def read_codes(weight: Tensor, n: int, k: int, group: int, spec_bits: int) -> Tensor:
    """Signed codes int8 [n, k] of a layout's ``weight``: the inverse of what :func:`make_layout` did to them."""
    blocks, groups = weight.shape[:2]
    bits = 4 if spec_bits <= 4 else 8
    unsigned = weight.reshape(blocks, groups, -1, _ROWS, 4).permute(0, 3, 1, 2, 4)
    if bits == 4:
        unsigned = torch.stack([unsigned & 15, unsigned >> 4], dim=4)
    codes = unsigned.reshape(blocks * _ROWS, groups, -1)[:n, :, :group].reshape(n, k)
    return (codes - (1 << (bits - 1))).view(torch.int8)
