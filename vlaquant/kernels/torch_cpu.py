"""Kernels that ship inside PyTorch, for x86 CPUs.

Both have a slow path that gives the right numbers 20 to 5000 times later; ``why_not`` keeps us off it. ``int4pack`` is
slow for all activations but bfloat16. ``onednn`` falls back to a naive loop for *signed* int8 activations, so codes are
shifted by 128 to unsigned ones, with a zero point of 128 to undo it.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vlaquant.kernels.base import Kernel, Query, Stored, quantize_input, unpack
from vlaquant.scheme import Granularity

_INT4PACK_GROUPS = (32, 64, 128, 256)
_INT4PACK_ROWS = 16
_INT4PACK_INNER_TILES = 1  # taken and ignored by the CPU version

_UNSIGNED = 128  # int8 code + 128 = uint8 code
#: Beyond, k products of 255 · 128 can overflow the int32 that they are summed in.
_INT32_COLUMNS = (2**31 - 1) // (255 * 128)


def _int4pack_why_not(query: Query) -> str | None:
    weight = query.scheme.weight
    if query.device != "cpu":
        return f"runs on cpu, not on {query.device}"
    if query.scheme.activation is not None:
        return "is weight-only, and the scheme has int8 activations"
    if weight.bits != 4 or weight.group_size not in _INT4PACK_GROUPS:
        return f"needs 4 bits in groups of {_INT4PACK_GROUPS}, not {query.scheme.name}"
    if query.out_features % _INT4PACK_ROWS != 0:
        return f"needs out_features to be a multiple of {_INT4PACK_ROWS}, not {query.out_features}"
    if query.dtype != torch.bfloat16:
        return f"is only fast with bfloat16 activations, not {query.dtype}"
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        return f"has no vector code for this CPU ({torch.backends.cpu.get_cpu_capability()})"
    return None


def _int4pack_prepare(stored: Stored, query: Query) -> tuple[Tensor, ...]:
    weight = unpack(stored, query)
    unsigned = weight.codes.to(torch.int32) + 8
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, _INT4PACK_INNER_TILES)  # noqa: SLF001
    # The kernel computes (u - 8) · scale + offset, in float32; our weight is (u - 8 - zero) · scale
    scale = weight.scale.to(torch.float32)
    offset = torch.zeros_like(scale) if weight.zero is None else -weight.zero * scale
    return packed, torch.stack([scale.T, offset.T], dim=-1).to(torch.bfloat16).contiguous()


def _int4pack_run(x: Tensor, stored: Stored, prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    packed, scale_and_offset = prepared
    group_size = query.scheme.weight.group_size
    matmul = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001 - no public name as yet
    y: Tensor = matmul(x.contiguous(), packed, group_size, scale_and_offset)
    return y if stored.bias is None else y + stored.bias.to(y.dtype)


def _onednn_why_not(query: Query) -> str | None:
    weight, activation = query.scheme.weight, query.scheme.activation
    if query.device != "cpu":
        return f"runs on cpu, not on {query.device}"
    if activation is None:
        return "needs int8 activations, and the scheme is weight-only"
    if weight.granularity is Granularity.GROUP:
        return f"needs weight scales per channel or tensor, not in groups of {weight.group_size}"
    if not weight.symmetric:
        return "needs a symmetric weight"
    if activation.dynamic and not activation.symmetric:
        return "has no zero point per token"
    if query.in_features > _INT32_COLUMNS:
        return f"could overflow int32 with in_features={query.in_features}, more than {_INT32_COLUMNS}"
    if not torch.backends.mkldnn.is_available():
        return "needs a PyTorch that was built with oneDNN"
    if not _has_vnni():
        return "needs an x86 CPU with VNNI"
    if not _sums_exactly():
        return "saturates sums of products here, although the CPU has VNNI; is ONEDNN_MAX_CPU_ISA set?"
    return None


@lru_cache(maxsize=1)
def _has_vnni() -> bool:
    if not hasattr(torch.cpu, "get_capabilities"):  # an older torch, which cannot say
        return False
    capabilities: Mapping[str, Any] = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


@lru_cache(maxsize=1)
def _sums_exactly() -> bool:
    """Whether the largest products are summed without an int16 in between, which oneDNN does on older CPUs."""
    k, n = 64, 16
    codes = torch.full((1, k), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((n, k), 127, dtype=torch.int8, device="cpu")
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    zero = torch.zeros(n, dtype=torch.int32, device="cpu")
    y = torch.ops.vlaquant.onednn_int8(codes, zero[:1], packed, torch.ones(n, device="cpu"), zero)
    return bool((y == 255 * 127 * k).all())


def _onednn_prepare(stored: Stored, query: Query) -> tuple[Tensor, ...]:
    weight = unpack(stored, query)
    packed = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
    scale = weight.scale.to(torch.float32).expand(query.out_features, 1).flatten().contiguous()
    zero = torch.full((1,), _UNSIGNED, dtype=torch.int32, device="cpu")
    if stored.input_zero is not None:
        zero = zero + stored.input_zero
    return packed, scale, torch.zeros_like(scale, dtype=torch.int32), zero


# An operator of our own, because torch.compile takes oneDNN's only with a packed weight that is a constant of the graph
torch.library.define(
    "vlaquant::onednn_int8", "(Tensor x, Tensor zero, Tensor w, Tensor w_scale, Tensor w_zero) -> Tensor"
)


@torch.library.impl("vlaquant::onednn_int8", "CompositeExplicitAutograd")
def _onednn_int8(x: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor) -> Tensor:
    """Codes x uint8 [t, k], with a zero point for all, times the packed weight: float32 [t, n], without x's scale."""
    one = torch.ones(1, device="cpu")
    y: Tensor = torch.ops.onednn.qlinear_pointwise.tensor(
        x, one, zero, weight, weight_scale, weight_zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@torch.library.register_fake("vlaquant::onednn_int8")  # type: ignore[untyped-decorator]
def _onednn_int8_shape(x: Tensor, zero: Tensor, weight: Tensor, weight_scale: Tensor, weight_zero: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight_scale.shape[0], dtype=torch.float32)


def _onednn_run(x: Tensor, stored: Stored, prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    packed, weight_scale, weight_zero, zero = prepared
    assert query.scheme.activation is not None
    codes, scale, _ = quantize_input(x, stored, query.scheme.activation)
    unsigned = codes.contiguous().view(torch.uint8) ^ _UNSIGNED
    # The scale of the activations follows afterwards, because the kernel takes one for all tokens only
    y: Tensor = torch.ops.vlaquant.onednn_int8(unsigned, zero, packed, weight_scale, weight_zero) * scale
    if stored.bias is not None:
        y = y + stored.bias
    return y.to(x.dtype)


INT4PACK = Kernel("int4pack", _int4pack_why_not, _int4pack_prepare, _int4pack_run)
ONEDNN_INT8 = Kernel("onednn_int8", _onednn_why_not, _onednn_prepare, _onednn_run)
