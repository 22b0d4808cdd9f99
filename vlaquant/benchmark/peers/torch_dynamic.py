"""``quantized::linear_dynamic`` of torch: int8 weights per channel, activations with one scale for all tokens."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vlaquant.benchmark.peers.base import Peer, eight_bit_objection
from vlaquant.kernels import Query
from vlaquant.numerics import QuantizedWeight


def _why_not(engine: str) -> Callable[[Query], str | None]:
    def why_not(query: Query) -> str | None:
        if engine not in torch.backends.quantized.supported_engines:
            return f"this torch has no engine {engine}"
        return eight_bit_objection(query)

    return why_not


def _prepare(engine: str) -> Callable[[QuantizedWeight, int], Callable[[Tensor], Tensor]]:
    def prepare(weight: QuantizedWeight, _threads: int) -> Callable[[Tensor], Tensor]:
        n, _ = weight.codes.shape
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the dtypes are deprecated
                scale, zero = weight.scale.flatten().double(), torch.zeros(n, dtype=torch.int64)
                codes = torch._make_per_channel_quantized_tensor(weight.codes, scale, zero, 0)  # noqa: SLF001
                packed = torch.ops.quantized.linear_prepack(codes, None)
        finally:
            torch.backends.quantized.engine = before
        run = torch.ops.quantized.linear_dynamic
        return lambda x: run(x.float(), packed, False).to(x.dtype)  # noqa: FBT003

    return prepare


PEERS = tuple(
    Peer(f"linear_dynamic {engine} (per tensor)", "int8 per tensor", _why_not(engine), _prepare(engine))
    for engine in ("onednn", "fbgemm")
)
