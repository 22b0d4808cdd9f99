"""A 4-bit weight times float activations, in Triton. Sums are float32, whatever the dtype of the activations.

Three ways, by the number of tokens: ``gemv`` multiplies and adds in registers; ``gemm`` feeds the tensor cores;
``dense`` writes the float weight to memory and calls PyTorch's matmul, which wins when a weight is used often enough.
The first two can split k over instances that leave float32 partial sums, added up in a fixed order by a second kernel:
there are no atomics, and so equal inputs give equal outputs.

**Layout.** A row is cut into blocks of 8·L columns (L = 32, or 16 for groups of 16), padded with code 0. Word j of a
block holds, from the lowest bits up, the codes of columns j, L + j, 2·L + j, … 7·L + j:

    word j      |31  28|  ...  |7    4|3     0|
    column      | 7L+j |  ...  |  L+j |   j   |

So plane p of a run of L words, ``(word >> 4·p) & 15``, is L neighbouring columns. Words and activations are both read
as whole runs, nothing is shuffled between threads, and a plane is one k-step of a tensor core. In the file's layout
neighbours sit in the planes of one word, and activations would be read 8 apart. A plane lies within one group, because
groups are powers of two of 16 at least. Scales and zero points are [g, n]: an instance reads neighbouring rows.

**Unpacking.** An integer below 2^(23 - b) at bit b of a float32 mantissa, under the exponent of 2^(23 - b), is the
number 2^(23 - b) + u, exactly: one mask-and-or and one subtraction give u - 8 - zero, without a shift for five of the
eight planes and without a conversion. The tensor cores get these integers, which every dtype holds exactly, and the
scale of a group meets the sum over the group: less work than scaling the weight, and nothing is rounded.
"""

from __future__ import annotations  # Triton reads annotations as text, and there may be no Triton

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlaquant.kernels.base import Kernel, Query, Stored, unpack
from vlaquant.kernels.triton_common import (
    Config,
    bucket,
    choose,
    dot_dtype,
    on_device_of,
    output_dtype,
    split_to_fill,
    why_not_here,
)
from vlaquant.kernels.triton_w4a16_jit import add_parts_kernel, dequantize_kernel, gemm_kernel, gemv_kernel

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SMALLEST_GROUP = 16
_PLANES = 8
_LANES = 32  # columns of a plane

_GEMV_TOKENS = 4
_SPLIT_TOKENS = 16
_DENSE_TOKENS = 256  # beyond, dense is tried first; tuning decides from here on

_REDUCE_BLOCK = 512
_DEQUANTIZE_ROWS = 16
_DENSE = Config("dense")


@dataclass(frozen=True, slots=True)
class Packed:
    """A weight in the layout of this file.

    Attributes:
        words: int32 [n, blocks · lanes].
        scale: [g, n], with as many rows as the padded columns have groups.
        zero: int8, shaped as ``scale``; None if symmetric.
        group: columns that share a scale; all columns, with their padding, per channel and per tensor.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int

    @property
    def lanes(self) -> int:
        """Columns of a plane, L above."""
        return min(self.group, _LANES)

    @property
    def blocks(self) -> int:
        """Blocks of a row."""
        return self.words.shape[1] // self.lanes

    def arguments(self) -> dict[str, Any]:
        """What every kernel is told about it."""
        planes = min(self.group // self.lanes, _PLANES)
        return {
            "blocks": self.blocks,
            "group_blocks": max(self.group // (self.lanes * _PLANES), 1),
            "LANES": self.lanes,
            "GROUP_PLANES": planes,
            "HAS_ZERO": self.zero is not None,
        }


def pack_planes(codes: Tensor, lanes: int) -> Tensor:
    """Codes int8 [n, k] in [-8, 7] -> int32 [n, blocks · lanes], as drawn above."""
    n, k = codes.shape
    blocks = -(-k // (_PLANES * lanes))
    planes = functional.pad(codes, (0, blocks * _PLANES * lanes - k)).reshape(n, blocks, _PLANES, lanes)
    words = torch.zeros(n, blocks, lanes, dtype=torch.int32, device=codes.device)
    for plane in range(_PLANES):
        words |= (planes[:, :, plane].to(torch.int32) + 8) << (4 * plane)
    return words.reshape(n, blocks * lanes)


def multiply(x: Tensor, weight: Packed, bias: Tensor | None, config: Config) -> Tensor:
    """The product of x [t, k], contiguous, and the weight, cut up as ``config`` says: [t, n]."""
    if config.path == "dense":
        return functional.linear(x, dequantize(weight, x), None if bias is None else bias.to(x.dtype))
    return _split_k(x, weight, bias, config).to(x.dtype)


def _split_k(x: Tensor, weight: Packed, bias: Tensor | None, config: Config) -> Tensor:
    t, k = x.shape
    n, split = weight.words.shape[0], config.split
    dtype = output_dtype(x.dtype)
    y = torch.empty(t, n, dtype=dtype, device=x.device)
    parts = y if split == 1 else torch.empty(split, t, n, dtype=torch.float32, device=x.device)
    arguments = weight.arguments() | {
        "tokens": t,
        "n": n,
        "k": k,
        "split_blocks": -(-weight.blocks // split),
        "BLOCK_N": config.block_n,
        "HAS_BIAS": split == 1 and bias is not None,
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    tensors = (x, weight.words, weight.scale, weight.zero, bias, parts)
    row_blocks = -(-n // config.block_n)
    if config.path == "gemv":
        gemv_kernel[row_blocks, split, t](*tensors, nothing=0, **arguments)
    else:
        grid = (row_blocks * -(-t // config.block_m), split)
        gemm_kernel[grid](*tensors, BLOCK_M=config.block_m, DOT=dot_dtype(x.dtype), **arguments)
    if split > 1:
        pieces = -(-t * n // _REDUCE_BLOCK)
        add_parts_kernel[(pieces,)](
            parts, bias, y, t * n, n, SPLIT=split, BLOCK=_REDUCE_BLOCK, HAS_BIAS=bias is not None
        )
    return y


def dequantize(weight: Packed, x: Tensor) -> Tensor:
    """The float weight [n, k] for activations x [t, k], in their dtype."""
    n, k = weight.words.shape[0], x.shape[1]
    out = torch.empty(n, k, dtype=output_dtype(x.dtype), device=x.device)
    grid = (-(-n // _DEQUANTIZE_ROWS), weight.blocks)
    dequantize_kernel[grid](
        weight.words, weight.scale, weight.zero, out, n=n, k=k, BLOCK_N=_DEQUANTIZE_ROWS, **weight.arguments()
    )
    return out.to(x.dtype)


def candidates(tokens: int, n: int, blocks: int, dtype: torch.dtype) -> list[Config]:
    """The configs that may be best for so many tokens, a power of two; the first is the one to take unseen."""
    wide = dtype == torch.float32  # its products do not run on tensor cores
    if tokens <= _SPLIT_TOKENS:
        gemm = [
            Config("gemm", rows, _SPLIT_TOKENS, warps=warps, stages=3) for rows, warps in ((64, 4), (32, 4), (128, 8))
        ]
        gemv = [Config("gemv", 32, warps=2), Config("gemv", 64), Config("gemv", 16, warps=2)]
        few = tokens == 1 or (wide and tokens <= _GEMV_TOKENS)
        shapes = gemv + gemm if few else gemm + gemv * (tokens <= _GEMV_TOKENS)
        return _with_splits(shapes, 1, n, blocks)
    if wide:
        return [_DENSE]
    block_m = min(tokens, 64)
    shapes = [
        Config("gemm", 64, block_m, stages=3),
        Config("gemm", 128, block_m, warps=8, stages=3),
        Config("gemm", 64, 32, stages=3),
    ]
    shapes = _with_splits(shapes, tokens // block_m, n, blocks)
    return [_DENSE, *shapes] if tokens > _DENSE_TOKENS else [*shapes, _DENSE]


def _with_splits(shapes: list[Config], token_blocks: int, n: int, blocks: int) -> list[Config]:
    """Each of them split so that it fills the device, and not split."""
    filling = [replace(shape, split=split_to_fill(token_blocks * -(-n // shape.block_n), blocks)) for shape in shapes]
    return list(dict.fromkeys([*filling, *shapes]))


def _why_not(query: Query) -> str | None:
    weight = query.scheme.weight
    if (reason := why_not_here(query.device)) is not None:
        return reason
    if query.scheme.activation is not None:
        return "is weight-only, and the scheme has int8 activations"
    if weight.bits != 4:
        return f"needs 4 bits, not {weight.bits}"
    size = weight.group_size
    if size is not None and (size < _SMALLEST_GROUP or size & (size - 1) != 0):
        return f"needs groups of a power of two, {_SMALLEST_GROUP} or more, not {size}"
    if query.dtype not in _DTYPES:
        return f"takes bfloat16, float16 and float32 activations, not {query.dtype}"
    return None


def pack(stored: Stored, query: Query) -> Packed:
    """The layout of this file from that of the checkpoint."""
    weight = unpack(stored, query)
    n, k = weight.codes.shape
    size = query.scheme.weight.group_size
    lanes = _LANES if size is None else min(size, _LANES)
    words = pack_planes(weight.codes, lanes)
    padded = _PLANES * words.shape[1]
    missing = 0 if size is None else -(-padded // size) - k // size

    def transposed(values: Tensor) -> Tensor:
        return functional.pad(values.expand(n, -1).T, (0, 0, 0, missing)).contiguous()

    zero = None if weight.zero is None else transposed(weight.zero)
    return Packed(words, transposed(weight.scale), zero, size or padded)


def _prepare(stored: Stored, query: Query) -> tuple[Tensor, ...]:
    weight = pack(stored, query)
    return (weight.words, weight.scale) if weight.zero is None else (weight.words, weight.scale, weight.zero)


# An operator of our own, so that torch.compile neither looks inside nor needs to know about block sizes
torch.library.define(
    "vlaquant::triton_w4a16", "(Tensor x, Tensor words, Tensor scale, Tensor? zero, Tensor? bias, int group) -> Tensor"
)


@torch.library.impl("vlaquant::triton_w4a16", "CompositeExplicitAutograd")
def _w4a16(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int) -> Tensor:
    weight = Packed(words, scale, zero, group)
    t, k = x.shape
    n = words.shape[0]
    x = x.contiguous()
    key = ("w4a16", n, k, group, zero is not None, x.dtype, scale.dtype, bucket(t))
    with on_device_of(x):
        config = choose(
            key,
            lambda: candidates(bucket(t), n, weight.blocks, x.dtype),
            lambda config: multiply(x, weight, bias, config),
        )
        return multiply(x, weight, bias, config)


@torch.library.register_fake("vlaquant::triton_w4a16")  # type: ignore[untyped-decorator]
def _w4a16_shape(
    x: Tensor, words: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, group: int
) -> Tensor:
    return x.new_empty(x.shape[0], words.shape[0])


def _run(x: Tensor, stored: Stored, prepared: tuple[Tensor, ...], query: Query) -> Tensor:
    words, scale = prepared[:2]
    zero = prepared[2] if len(prepared) > 2 else None
    group = query.scheme.weight.group_size or _PLANES * words.shape[1]
    y: Tensor = torch.ops.vlaquant.triton_w4a16(x, words, scale, zero, stored.bias, group)
    return y


TRITON_W4A16 = Kernel("triton_w4a16", _why_not, _prepare, _run)
