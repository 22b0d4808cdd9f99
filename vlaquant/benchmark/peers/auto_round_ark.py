"""The kernels of auto-round (package ``auto-round-lib``): 4-bit weights with float32 or int8 arithmetic.

int8 weights are left out: with one group of 11008 they end the process by a division by zero. ``auto`` as compute type
is left out too: it rounds activations where int4 weight-only was asked for.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlaquant.benchmark.peers.base import Peer, four_bit_objection
from vlaquant.kernels import Query
from vlaquant.numerics import QuantizedWeight

_ark: Any = importlib.import_module("auto_round_kernel")


def _why_not(compute: str) -> Callable[[Query], str | None]:
    return lambda query: four_bit_objection(query, (32, 64, 128), int8_activations=compute == "int8")


def _prepare(compute: str) -> Callable[[QuantizedWeight, int], Callable[[Tensor], Tensor]]:
    def prepare(weight: QuantizedWeight, _threads: int) -> Callable[[Tensor], Tensor]:
        n, k = weight.codes.shape
        group, asymmetric = weight.spec.group_size, weight.zero is not None
        scale = weight.scale.float().T.contiguous()
        zero = torch.empty(0, dtype=torch.int8) if weight.zero is None else weight.zero.T.contiguous()
        codes = weight.codes.T.contiguous()
        blob = _ark.repack_quantized_weight(codes, scale, zero, group, compute, "int4", "fp32", asymmetric)
        no_bias = torch.empty(0)

        def run(x: Tensor) -> Tensor:
            y: Tensor = _ark.woqgemm(x.float(), blob, no_bias, n, k, group, compute, "int4", "fp32", asymmetric)
            return y.to(x.dtype)

        return run

    return prepare


PEERS = (
    Peer("auto-round ARK fp32", "float", _why_not("fp32"), _prepare("fp32")),
    Peer("auto-round ARK int8", "int8", _why_not("int8"), _prepare("int8")),
)
