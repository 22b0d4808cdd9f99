"""Codes as dense bits: the layout of compressed-tensors' ``pack-quantized`` format, for 2 to 8 bits.

A signed code q of b bits is stored as the unsigned u = q + 2^(b-1). The codes of a row follow each other without gaps,
least significant bit first, in a row of int32 words; what is left of the last word is 0. Four bits:

    word        |            w0                 |            w1 ...
    bit         |31  28|  ...  |7    4|3     0|     |
    code        |  u7  |  ...  |  u1  |  u0   |  u15 ...

Three bits do not divide 32, so codes straddle bytes and words, and 32 codes take exactly 3 words:

    byte        |      0        |      1        |      2        |
    bit         |0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|0 1 2 3 4 5 6 7|
    code        |0 0 0 1 1 1 2 2|2 3 3 3 4 4 4 5|5 5 6 6 6 7 7 7|

The picture shows what the code relies on: whatever b is, 8 codes fill exactly b bytes, and no code spans more than two.
"""

import torch
from torch import Tensor
from torch.nn import functional

_CODES = 8  # a block of 8 codes of b bits is b bytes long


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [n, k] as int32 [n, ceil(k * bits / 32)], each row on its own."""
    n, k = codes.shape
    _check(codes, bits)
    unsigned = codes.to(torch.int16).add_(1 << (bits - 1)).to(torch.uint8)
    blocks = functional.pad(unsigned, (0, -k % _CODES)).reshape(n, -(-k // _CODES), _CODES)
    block = torch.zeros(blocks.shape[:2], dtype=torch.int64, device=codes.device)
    for i in range(_CODES):
        block |= blocks[..., i].to(torch.int64) << (i * bits)
    stream = block.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)
    words = packed_width(k, bits)
    # Bytes past the last word hold padding only, so cutting them off loses nothing
    return functional.pad(stream, (0, 4 * words - stream.shape[1])).flatten().view(torch.int32).reshape(n, words)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_rows`: int32 [n, ceil(k * bits / 32)] as signed codes int8 [n, k]."""
    n = packed.shape[0]
    assert packed.dtype == torch.int32, packed.dtype
    assert packed.shape[1] == packed_width(k, bits), (tuple(packed.shape), bits, k)
    stream = packed.flatten().view(torch.uint8).reshape(n, 4 * packed.shape[1])
    count = -(-stream.shape[1] // bits)
    blocks = functional.pad(stream, (0, count * bits - stream.shape[1])).reshape(n, count, bits)
    codes = torch.empty(n, count, _CODES, dtype=torch.uint8, device=packed.device)
    for i in range(_CODES):
        byte, shift = divmod(i * bits, 8)
        low = blocks[..., byte] >> shift
        if shift + bits > 8:
            low = low | (blocks[..., byte + 1] << (8 - shift))
        codes[..., i] = low
    codes &= (1 << bits) - 1
    # u - 2^(b-1) wraps around in uint8 exactly as two's complement does
    codes -= 1 << (bits - 1)
    return codes.view(torch.int8).flatten(1)[:, :k].contiguous()


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [n, g] as int32 [ceil(n * bits / 32), g]: each column is a bit stream. For zero points."""
    return pack_rows(codes.T, bits).T.contiguous()


def unpack_columns(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of :func:`pack_columns`: int32 [ceil(n * bits / 32), g] as signed codes int8 [n, g]."""
    return unpack_rows(packed.T, bits, n).T.contiguous()


def packed_width(count: int, bits: int) -> int:
    """How many int32 words ``count`` codes take."""
    return -(-count * bits // 32)


def _check(codes: Tensor, bits: int) -> None:
    assert 2 <= bits <= 8, bits
    assert codes.dtype == torch.int8, codes.dtype
    if codes.device.type == "meta" or codes.numel() == 0:
        return
    # A code that is out of range would run over into its neighbours
    low, high = (int(bound) for bound in codes.aminmax())
    assert low >= -(1 << (bits - 1)), (low, bits)
    assert high < 1 << (bits - 1), (high, bits)
