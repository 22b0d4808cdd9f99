"""What a peer is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlaquant.kernels import Query
from vlaquant.numerics import QuantizedWeight
from vlaquant.scheme import Granularity


@dataclass(frozen=True, slots=True)
class Peer:
    """Another package's way to compute ``x @ W.T``.

    Attributes:
        name: package and path.
        activations: ``float``; ``int8`` where the package rounds them, each token or group of a token by itself; ``int8
            per tensor`` where all tokens share a scale, which is faster and coarser than our schemes.
        why_not: the reason why it cannot compute such a layer, or None.
        prepare: (weight, threads) -> the function from x [t, k] to [t, n] in the dtype of x; whatever it converts on
            the way is part of its time.
    """

    name: str
    activations: str
    why_not: Callable[[Query], str | None]
    prepare: Callable[[QuantizedWeight, int], Callable[[Tensor], Tensor]]


def four_bit_objection(query: Query, groups: tuple[int, ...], *, int8_activations: bool) -> str | None:
    """What all adapters for 4-bit weights in groups want."""
    weight = query.scheme.weight
    if query.device != "cpu":
        return "runs on cpu"
    if weight.bits != 4 or weight.group_size not in groups:
        return f"needs 4 bits in groups of {groups}"
    if (query.scheme.activation is not None) != int8_activations:
        return "rounds activations to int8" if int8_activations else "is weight-only"
    if query.scheme.activation is not None and not query.scheme.activation.dynamic:
        return "chooses the range of activations by itself"
    return None


def eight_bit_objection(query: Query) -> str | None:
    """What adapters for int8 weights per channel with int8 activations want."""
    weight, activation = query.scheme.weight, query.scheme.activation
    if query.device != "cpu":
        return "runs on cpu"
    if activation is None or not activation.dynamic:
        return "rounds activations to int8, and chooses their range by itself"
    if weight.granularity is not Granularity.CHANNEL or not weight.symmetric:
        return "needs a symmetric weight with a scale per channel"
    return None


def unsigned_codes(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """4-bit codes and zero points as 0 to 15: uint8 [n, k] and uint8 [n, g]."""
    zero = weight.scale.new_zeros(weight.scale.shape, dtype=torch.int8) if weight.zero is None else weight.zero
    return (weight.codes + 8).view(dtype=torch.uint8), (zero + 8).view(dtype=torch.uint8)
