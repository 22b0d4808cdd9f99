"""OpenVINO: a compressed weight in the graph, and dynamic quantization of activations in groups, or none.

``ov.Tensor`` reads the array that it is given and does not keep it alive, so each constant's array is kept here.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlaquant.benchmark.peers.base import Peer, eight_bit_objection, four_bit_objection, unsigned_codes
from vlaquant.kernels import Query
from vlaquant.numerics import QuantizedWeight

_ov: Any = importlib.import_module("openvino")
_ops: Any = importlib.import_module("openvino.opset13")
_core: Any = _ov.Core()


def _run_of(weight: Any, k: int, group: int, threads: int, kept: list[Any]) -> Callable[[Tensor], Tensor]:
    """A compiled product with ``weight``, a float32 node [n, k]."""
    x = _ops.parameter([-1, k], np.float32)
    model = _ov.Model([_ops.matmul(x, weight, transpose_a=False, transpose_b=True)], [x])
    settings = {
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = _core.compile_model(model, "CPU", settings).create_infer_request()

    def run(x: Tensor) -> Tensor:
        assert kept  # the constants' memory
        found = request.infer([x.float().contiguous().numpy()], share_inputs=True, share_outputs=False)
        return torch.from_numpy(found[0]).to(x.dtype)

    return run


def _four_bits(group: int) -> Callable[[QuantizedWeight, int], Callable[[Tensor], Tensor]]:
    def prepare(weight: QuantizedWeight, threads: int) -> Callable[[Tensor], Tensor]:
        n, k = weight.codes.shape
        size = weight.spec.group_size
        assert size is not None
        codes, zero = (tensor.numpy().reshape(-1) for tensor in unsigned_codes(weight))
        packed = [np.ascontiguousarray(values[::2] | (values[1::2] << 4)) for values in (codes, _even(zero))]
        shapes = ([n, k // size, size], [n, k // size, 1])
        constants = [
            _ops.convert(_ops.constant(_ov.Tensor(values, _ov.Shape(shape), _ov.Type.u4)), np.float16)
            for values, shape in zip(packed, shapes, strict=True)
        ]
        scale = weight.scale.to(torch.float16).numpy().reshape(n, k // size, 1)
        groups = _ops.multiply(_ops.subtract(*constants), _ops.constant(scale))
        rows = _ops.reshape(groups, _ops.constant(np.array([n, k])), special_zero=False)
        return _run_of(_ops.convert(rows, np.float32), k, group, threads, packed)

    return prepare


def _even(values: np.ndarray) -> np.ndarray:
    return np.pad(values, (0, len(values) % 2))


def _eight_bits(weight: QuantizedWeight, threads: int) -> Callable[[Tensor], Tensor]:
    n, k = weight.codes.shape
    codes, scale = weight.codes.numpy().copy(), weight.scale.float().numpy().reshape(n, 1).copy()
    values = _ops.multiply(_ops.convert(_ops.constant(codes), np.float32), _ops.constant(scale))
    return _run_of(values, k, 128, threads, [codes, scale])


def _why_not(*, int8: bool) -> Callable[[Query], str | None]:
    return lambda query: four_bit_objection(query, (32, 64, 128), int8_activations=int8)


PEERS = (
    Peer("OpenVINO u4", "float", _why_not(int8=False), _four_bits(0)),
    Peer("OpenVINO u4, dynamic int8 (g128)", "int8", _why_not(int8=True), _four_bits(128)),
    Peer("OpenVINO i8, dynamic int8 (g128)", "int8", eight_bit_objection, _eight_bits),
)
