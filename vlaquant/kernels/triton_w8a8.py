"""Int8 weights times int8 activations, in Triton. Sums over k are int32 and exact; scales come in at the end.

A first kernel makes the codes of the activations, bit for bit those of :func:`vlaquant.numerics.quantize_tokens`, one
token an instance. Then ``gemv`` multiplies in registers, for few tokens, or ``gemm`` by tensor cores; the scale of a
token, that of a row, the zero point of the activations and the bias are applied before the result is written. Both can
split k over instances; as integers add up in any order to the same, that changes no bit of the result.

With a zero point Z of the activations, Σ (q - Z) · w = Σ q · w - Z · Σ w, and Σ w is known beforehand. Single sums may
wrap around in int32, but the difference is right as long as it fits.

The weight is read as it is stored: a row is a run of int8, which is what tensor cores want.

A token with a NaN gives NaN throughout, as a scale per token has seen it; under static scales a NaN has code 0.
"""

from __future__ import annotations  # as its neighbours

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlaquant.kernels.base import Kernel, Query, Stored, unpack
from vlaquant.kernels.triton_common import (
    Config,
    bucket,
    choose,
    on_device_of,
    output_dtype,
    split_to_fill,
    why_not_here,
)
from vlaquant.kernels.triton_w8a8_jit import (
    add_parts_kernel,
    gemm_kernel,
    gemv_kernel,
    quantize_static_kernel,
    quantize_tokens_kernel,
)
from vlaquant.scheme import Granularity

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Beyond, k products of 255 · 127 can overflow the int32 that they are summed in.
_INT32_COLUMNS = (2**31 - 1) // (255 * 127)

_GEMV_TOKENS = 4
_SPLIT_TOKENS = 16
_GEMV_COLUMNS = 512  # of a step along k
_GEMM_COLUMNS = 128
_QUANTIZE_BLOCK = 1024
_REDUCE_BLOCK = 512

_SMALLEST_SCALE = torch.finfo(torch.float32).smallest_normal


class Activations(NamedTuple):
    """Activations as codes.

    Attributes:
        codes: int8 [t, k].
        scale: float32 [t], or [1] for all tokens.
        zero: int32, shaped as ``scale``; None if symmetric.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None


class Weight(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        codes: int8 [n, k].
        scale: float32 [n].
        sums: int32 [n], the sum of the codes of a row.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


def quantize(x: Tensor, scale: Tensor | None, zero: Tensor | None, *, symmetric: bool) -> Activations:
    """Codes of x [t, k], contiguous; with the static ``scale`` and ``zero`` of [1], or without them per token."""
    t, k = x.shape
    codes = torch.empty(t, k, dtype=torch.int8, device=x.device)
    if scale is not None:
        grid = (t, -(-k // _QUANTIZE_BLOCK))
        quantize_static_kernel[grid](x, codes, scale, zero, k, SYMMETRIC=symmetric, BLOCK=_QUANTIZE_BLOCK)
        return Activations(codes, scale, zero)
    scale = torch.empty(t, dtype=torch.float32, device=x.device)
    zero = None if symmetric else torch.empty(t, dtype=torch.int32, device=x.device)
    quantize_tokens_kernel[(t,)](
        x, codes, scale, zero, k, SMALLEST=_SMALLEST_SCALE, SYMMETRIC=symmetric, BLOCK=_QUANTIZE_BLOCK
    )
    return Activations(codes, scale, zero)


def multiply(
    activations: Activations, weight: Weight, bias: Tensor | None, dtype: torch.dtype, config: Config
) -> Tensor:
    """The product [t, n] in ``dtype``, cut up as ``config`` says."""
    t, k = activations.codes.shape
    n, split = weight.codes.shape[0], config.split
    y = torch.empty(t, n, dtype=output_dtype(dtype), device=weight.codes.device)
    sums = y if split == 1 else torch.empty(split, t, n, dtype=torch.int32, device=y.device)
    scales = (activations.scale, activations.zero, weight.scale, weight.sums, bias)
    flags: dict[str, Any] = {
        "PER_TOKEN": int(activations.scale.shape[0] > 1),
        "HAS_ZERO": activations.zero is not None,
        "HAS_BIAS": bias is not None,
    }
    columns = _GEMV_COLUMNS if config.path == "gemv" else _GEMM_COLUMNS
    arguments = flags | {
        "tokens": t,
        "n": n,
        "k": k,
        "split_steps": -(-k // (columns * split)),
        "BLOCK_N": config.block_n,
        "BLOCK_K": columns,
        "PARTS": split > 1,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    row_blocks = -(-n // config.block_n)
    if config.path == "gemv":
        gemv_kernel[row_blocks, split, t](activations.codes, weight.codes, *scales, sums, **arguments)
    else:
        grid = (row_blocks * -(-t // config.block_m), split)
        gemm_kernel[grid](activations.codes, weight.codes, *scales, sums, BLOCK_M=config.block_m, **arguments)
    if split > 1:
        pieces = -(-t * n // _REDUCE_BLOCK)
        add_parts_kernel[(pieces,)](sums, *scales, y, t, t * n, n, SPLIT=split, BLOCK=_REDUCE_BLOCK, **flags)
    return y.to(dtype)


def candidates(tokens: int, n: int, k: int) -> list[Config]:
    """The configs that may be best for so many tokens, a power of two; the first is the one to take unseen."""
    block_m = min(max(tokens, _SPLIT_TOKENS), 128)
    shapes = [Config("gemm", 64, block_m, stages=4), Config("gemm", 128, block_m, warps=8, stages=3)]
    if tokens <= _SPLIT_TOKENS:
        shapes.append(Config("gemm", 32, block_m, stages=4))
    else:
        shapes += [Config("gemm", 128, 64, stages=3), Config("gemm", 64, 64, stages=4)]
    if tokens <= _GEMV_TOKENS:
        shapes += [Config("gemv", 8), Config("gemv", 16, warps=8)]
    filling = [_filling(shape, tokens, n, k) for shape in shapes]
    return list(dict.fromkeys([*filling, *shapes]))


def _filling(shape: Config, tokens: int, n: int, k: int) -> Config:
    """Split so that the device is full."""
    columns, token_blocks = _GEMV_COLUMNS, tokens
    if shape.path == "gemm":
        columns, token_blocks = _GEMM_COLUMNS, -(-tokens // shape.block_m)
    return replace(shape, split=split_to_fill(token_blocks * -(-n // shape.block_n), -(-k // columns)))


def _why_not(query: Query) -> str | None:
    weight, activation = query.scheme.weight, query.scheme.activation
    if (reason := why_not_here(query.device)) is not None:
        return reason
    if activation is None:
        return "needs int8 activations, and the scheme is weight-only"
    if weight.granularity is Granularity.GROUP:
        return f"needs weight scales per channel or tensor, not in groups of {weight.group_size}"
    if not weight.symmetric:
        return "needs a symmetric weight"
    if query.in_features > _INT32_COLUMNS:
        return f"could overflow int32 with in_features={query.in_features}, more than {_INT32_COLUMNS}"
    if query.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32 activations, not {query.dtype}"
    return None


def _prepare(stored: Stored, query: Query) -> tuple[Tensor, ...]:
    """Scale and sum of each row; for static activations their scale, and their zero point if there is one."""
    weight = unpack(stored, query)
    scale = weight.scale.to(torch.float32).expand(query.out_features, 1).flatten().contiguous()
    prepared: tuple[Tensor, ...] = (scale, weight.codes.sum(dim=1, dtype=torch.int32))
    if stored.input_scale is None:
        return prepared
    # A cast to a narrow dtype can have made the scale zero
    prepared += (stored.input_scale.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny),)
    return prepared if stored.input_zero is None else (*prepared, stored.input_zero.to(torch.int32))


# An operator of our own, so that torch.compile neither looks inside nor needs to know about block sizes
torch.library.define(
    "vlaquant::triton_w8a8",
    "(Tensor x, Tensor weight, Tensor scale, Tensor sums, Tensor? x_scale, Tensor? x_zero, Tensor? bias, "
    "bool symmetric) -> Tensor",
)


@torch.library.impl("vlaquant::triton_w8a8", "CompositeExplicitAutograd")
def _w8a8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    sums: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    bias: Tensor | None,
    symmetric: bool,  # noqa: FBT001 - an operator has no keyword-only arguments here
) -> Tensor:
    t, k = x.shape
    n = weight.shape[0]
    known = Weight(weight.contiguous(), scale, sums)
    with on_device_of(x):
        activations = quantize(x.contiguous(), x_scale, x_zero, symmetric=symmetric)
        key = ("w8a8", n, k, x_scale is None, symmetric, x.dtype, bucket(t))
        config = choose(
            key,
            lambda: candidates(bucket(t), n, k),
            lambda config: multiply(activations, known, bias, x.dtype, config),
        )
        return multiply(activations, known, bias, x.dtype, config)


@torch.library.register_fake("vlaquant::triton_w8a8")  # type: ignore[untyped-decorator]
def _w8a8_shape(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _run(x: Tensor, stored: Stored, prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    scale, sums, x_scale, x_zero = (*prepared, None, None)[:4]
    spec = query.scheme.activation
    assert spec is not None
    y: Tensor = torch.ops.vlaquant.triton_w8a8(
        x, stored.weight, scale, sums, x_scale, x_zero, stored.bias, spec.symmetric
    )
    return y


TRITON_W8A8 = Kernel("triton_w8a8", _why_not, _prepare, _run)
