"""torchao's int4 weight-only tensor for CPUs (``Int4OpaqueTensor``), which is fast with bfloat16 activations only."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.benchmark.peers.base import Peer, four_bit_objection, unsigned_codes
from vlaquant.kernels import Query
from vlaquant.numerics import QuantizedWeight

# It has moved between versions
_PLACES = (
    "torchao.prototype.quantization.int4.int4_opaque_tensor",
    "torchao.quantization.quantize_.workflows.int4.int4_opaque_tensor",
)


def _tensor_class() -> Any:
    for place in _PLACES:
        try:
            return importlib.import_module(place).Int4OpaqueTensor
        except ModuleNotFoundError:
            continue
    raise ImportError("this version has no Int4OpaqueTensor where it is looked for")


_Int4OpaqueTensor = _tensor_class()


def _why_not(query: Query) -> str | None:
    if query.out_features % 16 != 0:
        return "needs out_features to be a multiple of 16"
    return four_bit_objection(query, (32, 64, 128), int8_activations=False)


def _prepare(weight: QuantizedWeight, _threads: int) -> Callable[[Tensor], Tensor]:
    codes, zero = unsigned_codes(weight)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)  # noqa: SLF001
    scale = weight.scale.float()
    # Its weight is (code - 8) · scale + offset
    offset = (8 - zero.float()) * scale
    scales = torch.stack([scale.T, offset.T], dim=-1).to(torch.bfloat16).contiguous()
    assert weight.spec.group_size is not None
    tensor = _Int4OpaqueTensor(packed, scales, [1, weight.spec.group_size], weight.codes.shape)
    return lambda x: functional.linear(x.to(torch.bfloat16), tensor).to(x.dtype)


PEERS = (Peer("torchao int4 (bfloat16)", "float", _why_not, _prepare),)
