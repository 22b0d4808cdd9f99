"""The paths that are compared for one Linear: float products, every kernel, the whole layer, and peers.

Letters: n out, k in, t tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.benchmark.limits import prepacked_fp32
from vlaquant.benchmark.peers import Peer
from vlaquant.kernels import KERNELS, Kernel, Query, select_kernel
from vlaquant.linear import QuantLinear, from_quantized
from vlaquant.numerics import QuantizedWeight, quantize_weight
from vlaquant.scheme import Scheme

#: x [t, k] -> y [t, n].
Run = Callable[[Tensor], Tensor]

FP32, BF16, PREPACKED = "F.linear float32", "F.linear bfloat16", "fp32 prepacked (MKL)"

#: Share of the product (Frobenius norm) by which a path may be wrong before it is left out, by what its inputs become.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}


@dataclass(frozen=True, slots=True)
class Path:
    """One way to compute ``x @ W.T``.

    Attributes:
        name: of the kernel or the peer.
        kind: ``float``, ``kernel``, ``layer`` or ``peer``.
        arithmetic: ``fp32``, ``bf16`` or ``int8``: the fastest unit that such a product could use.
        tolerance: how large its error may be.
        weight_bytes: that one call reads.
        make: () -> the function, with a copy of the weight of its own.
        input_dtype: of x.
        comparable: it means the same as the scheme, so that a peer of this kind is one to be faster than.
    """

    name: str
    kind: str
    arithmetic: str
    tolerance: float
    weight_bytes: int
    make: Callable[[], Run]
    input_dtype: torch.dtype
    comparable: bool = True


def float_paths(weight: Tensor, tokens: int) -> Iterator[Path]:
    """What a packed layer must beat; weight [n, k] is float32."""
    narrow = weight.to(torch.bfloat16)
    n = weight.numel()
    yield Path(FP32, "float", "fp32", TOLERANCE["float32"], 4 * n, lambda: _linear(weight), torch.float32)
    yield Path(BF16, "float", "bf16", TOLERANCE["bfloat16"], 2 * n, lambda: _linear(narrow), torch.bfloat16)
    if weight.device.type == "cpu" and torch.backends.mkl.is_available():

        def make() -> Run:
            run = prepacked_fp32(weight.clone(), tokens)
            assert run is not None
            return run

        yield Path(PREPACKED, "float", "fp32", TOLERANCE["float32"], 4 * n, make, torch.float32)


def _linear(weight: Tensor) -> Run:
    copy = weight.clone()
    return lambda x: functional.linear(x, copy)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """One quantized weight, as all paths of a scheme get it."""

    scheme: Scheme
    codes: QuantizedWeight
    layer: QuantLinear
    query: Query

    @property
    def bytes(self) -> int:
        """Of what is stored: packed codes, scales and zero points."""
        return sum(_size(tensor) for tensor in self.layer.stored() if tensor is not None)


def pack(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> PackedWeight:
    """Round weight [n, k] to the nearest codes, with scales in ``dtype``.

    Raises:
        PlanError: the group size does not divide k.
    """
    codes = quantize_weight(weight, scheme.weight, scale_dtype=dtype)
    # A fixed range for static activations that suits normal values; real ones are calibrated
    static = scheme.activation is not None and not scheme.activation.dynamic
    zero = torch.zeros(1, device=weight.device)
    layer = from_quantized(
        codes,
        scheme,
        None,
        dtype=dtype,
        input_scale=torch.full_like(zero, 4.5 / 127) if static else None,
        input_zero=zero if static and scheme.activation is not None and not scheme.activation.symmetric else None,
    )
    return PackedWeight(scheme, codes, layer, layer.query(dtype))


def packed_paths(packed: PackedWeight, kernels: tuple[Kernel, ...] = KERNELS) -> Iterator[Path]:
    """Every kernel that can compute the layer, and the layer as a model calls it."""
    tolerance = _tolerance(packed.query)
    arithmetic = _arithmetic(packed.query)
    for kernel in kernels:
        if kernel.why_not(packed.query) is not None:
            continue
        prepared = kernel.prepare(packed.layer.stored(), packed.query)
        read = sum(map(_size, prepared)) or packed.bytes
        yield Path(
            kernel.name,
            "kernel",
            arithmetic,
            tolerance,
            read,
            lambda kernel=kernel: _kernel(kernel, packed),  # type: ignore[misc]
            packed.query.dtype,
        )
    chosen = select_kernel(packed.query)
    read = sum(map(_size, chosen.prepare(packed.layer.stored(), packed.query))) or packed.bytes
    yield Path(
        f"layer, {chosen.name}", "layer", arithmetic, tolerance, read, lambda: _layer(packed), packed.query.dtype
    )


def peer_paths(packed: PackedWeight, peers: tuple[Peer, ...], threads: int) -> Iterator[Path]:
    """The peers that can compute with this weight."""
    for peer in peers:
        if peer.why_not(packed.query) is not None:
            continue
        int8 = peer.activations != "float"
        arithmetic = "int8" if int8 else _arithmetic(packed.query)
        # Some round scales, or the input, to half precision
        yield Path(
            peer.name,
            "peer",
            arithmetic,
            TOLERANCE["int8" if int8 else "bfloat16"],
            packed.bytes,
            lambda peer=peer: peer.prepare(packed.codes, threads),  # type: ignore[misc]
            packed.query.dtype,
            comparable=peer.activations != "int8 per tensor",
        )


def _kernel(kernel: Kernel, packed: PackedWeight) -> Run:
    copies = {name: tensor.clone() for name, tensor in packed.layer.stored()._asdict().items() if tensor is not None}
    stored = packed.layer.stored()._replace(**copies)
    query, prepared = packed.query, kernel.prepare(stored, packed.query)
    return lambda x: kernel.run(x, stored, prepared, query)


def _layer(packed: PackedWeight) -> Run:
    layer = packed.layer
    bare = {name: getattr(layer.stored(), name) for name in ("input_scale", "input_zero")}
    return from_quantized(
        QuantizedWeight(
            codes=packed.codes.codes.clone(),
            scale=packed.codes.scale.clone(),
            zero=None if packed.codes.zero is None else packed.codes.zero.clone(),
            spec=packed.codes.spec,
        ),
        packed.scheme,
        None,
        dtype=packed.query.dtype,
        **bare,
    )


def _tolerance(query: Query) -> float:
    if query.scheme.activation is not None:
        return TOLERANCE["int8"]
    return TOLERANCE[str(query.dtype).removeprefix("torch.")]


def _arithmetic(query: Query) -> str:
    if query.scheme.activation is not None:
        return "int8"
    return "fp32" if query.dtype == torch.float32 else "bf16"


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
