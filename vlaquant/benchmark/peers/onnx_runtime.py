"""ONNX Runtime: ``MatMulNBits`` for 4-bit weights, ``DynamicQuantizeMatMul`` for 8-bit ones.

``accuracy_level`` 4 lets MatMulNBits round activations to int8, one scale for each block of a token.
The models are built with the package ``onnx``.
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

_onnxruntime: Any = importlib.import_module("onnxruntime")
_onnx: Any = importlib.import_module("onnx")

_EXACT, _INT8 = 1, 4


def _run_of(node: Any, n: int, k: int, values: dict[str, Any], threads: int) -> Callable[[Tensor], Tensor]:
    """A session with one node that reads ``x`` and ``values`` and writes ``y``."""
    helper, dtype = _onnx.helper, _onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", dtype, ["t", k])],
        [helper.make_tensor_value_info("y", dtype, ["t", n])],
        [_onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = _onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that wait by spinning would take the cores from whatever runs next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = _onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        (y,) = session.run(None, {"x": x.float().numpy()})
        return torch.from_numpy(y).to(x.dtype)

    return run


def _n_bits(accuracy_level: int) -> Callable[[QuantizedWeight, int], Callable[[Tensor], Tensor]]:
    def prepare(weight: QuantizedWeight, threads: int) -> Callable[[Tensor], Tensor]:
        n, k = weight.codes.shape
        block = weight.spec.group_size
        assert block is not None
        codes, zero = (tensor.numpy() for tensor in unsigned_codes(weight))
        values = {
            "b": _nibbles(codes).reshape(n, k // block, block // 2),
            "scales": weight.scale.float().flatten().numpy(),
            "zeros": _nibbles(zero).flatten(),
        }
        node = _onnx.helper.make_node(
            "MatMulNBits",
            ["x", *values],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=block,
            accuracy_level=accuracy_level,
        )
        return _run_of(node, n, k, values, threads)

    return prepare


def _nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 [n, m] of 0 to 15 -> [n, ceil(m / 2)], the even ones in the low halves."""
    if values.shape[1] % 2:
        values = np.pad(values, ((0, 0), (0, 1)))
    packed: np.ndarray = values[:, ::2] | (values[:, 1::2] << 4)
    return packed


def _dynamic(weight: QuantizedWeight, threads: int) -> Callable[[Tensor], Tensor]:
    n, k = weight.codes.shape
    values = {
        "b": weight.codes.T.contiguous().numpy(),
        "scales": weight.scale.float().flatten().numpy(),
        "zeros": np.zeros(n, dtype=np.int8),
    }
    node = _onnx.helper.make_node("DynamicQuantizeMatMul", ["x", *values], ["y"], domain="com.microsoft")
    return _run_of(node, n, k, values, threads)


def _four_bits(query: Query) -> str | None:
    return four_bit_objection(query, (16, 32, 64, 128, 256), int8_activations=False)


def _four_bits_int8(query: Query) -> str | None:
    return four_bit_objection(query, (16, 32, 64, 128, 256), int8_activations=True)


PEERS = (
    Peer("onnxruntime MatMulNBits fp32", "float", _four_bits, _n_bits(_EXACT)),
    Peer("onnxruntime MatMulNBits int8", "int8", _four_bits_int8, _n_bits(_INT8)),
    Peer("onnxruntime dynamic (per tensor)", "int8 per tensor", eight_bit_objection, _dynamic),
)
