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
#: Blocks are copied in the widest integers that b bytes are made of.
_WIDEST = {2: torch.int16, 4: torch.int32, 6: torch.int16, 8: torch.int64}
_ROWS_OF = 1 << 19


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Signed codes int8 [n, k] as int32 [n, ceil(k * bits / 32)], each row on its own."""
    n, k = codes.shape
    assert 2 <= bits <= 8, bits
    assert codes.dtype == torch.int8, codes.dtype
    packed = torch.empty(n, packed_width(k, bits), dtype=torch.int32, device=codes.device)
    # Some rows at a time: what is computed on the way stays in a CPU's cache
    step = max(_ROWS_OF // max(k, 1), 1)
    for start in range(0, n, step):
        packed[start : start + step] = _packed(codes[start : start + step], bits)
    return packed


def _packed(codes: Tensor, bits: int) -> Tensor:
    n, k = codes.shape
    _check(codes, bits)
    count, words = -(-k // _CODES), packed_width(k, bits)
    padded = torch.empty(n, count * _CODES, dtype=torch.int8, device=codes.device)
    padded[:, :k] = codes
    padded[:, k:] = -(1 << (bits - 1))  # u = 0
    # A block in one integer; of b bits, q + 2^(b-1) is q with its sign bit turned over
    blocks = padded.flatten().view(torch.int64)
    blocks &= _every(8, 0, bits)
    blocks ^= _every(8, bits - 1, 1)
    for lane in (8, 16, 32):
        # Two neighbours of ``width`` bits move together, into a lane twice as wide
        width = bits * lane // 8
        high = blocks >> (lane - width)
        high &= _every(2 * lane, width, width)
        blocks &= _every(2 * lane, 0, width)
        blocks |= high
    element = _WIDEST.get(bits, torch.uint8)
    taken = bits // element.itemsize
    stream = blocks.view(element).reshape(n * count, _CODES // element.itemsize)[:, :taken].contiguous()
    stream = stream.flatten().view(torch.uint8).reshape(n, count * bits)
    # Bytes past the last word hold padding only, so cutting them off loses nothing
    return functional.pad(stream, (0, 4 * words - count * bits)).flatten().view(torch.int32).reshape(n, words)


def unpack_rows(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of :func:`pack_rows`: int32 [n, ceil(k * bits / 32)] as signed codes int8 [n, k]."""
    n = packed.shape[0]
    assert packed.dtype == torch.int32, packed.dtype
    assert packed.shape[1] == packed_width(k, bits), (tuple(packed.shape), bits, k)
    count = -(-k // _CODES)
    stream = packed.flatten().view(torch.uint8).reshape(n, 4 * packed.shape[1])
    stream = functional.pad(stream, (0, count * bits - stream.shape[1])).flatten()
    element = _WIDEST.get(bits, torch.uint8)
    taken = bits // element.itemsize
    blocks = torch.zeros(n * count, dtype=torch.int64, device=packed.device)
    filled = blocks.view(element).reshape(n * count, _CODES // element.itemsize)
    filled[:, :taken] = stream.view(element).reshape(n * count, taken)
    for lane in (32, 16, 8):
        width = bits * lane // 8
        high = blocks << (lane - width)
        high &= _every(2 * lane, lane, width)
        blocks &= _every(2 * lane, 0, width)
        blocks |= high
    codes = blocks.view(torch.uint8)
    # u - 2^(b-1) wraps around in uint8 exactly as two's complement does
    codes -= 1 << (bits - 1)
    return codes.view(torch.int8).reshape(n, count * _CODES)[:, :k].contiguous()


def _every(lane: int, start: int, width: int) -> int:
    """An int64 in which the bits [start, start + width) of every lane of so many bits are set."""
    ones = sum(((1 << width) - 1) << (at + start) for at in range(0, 64, lane))
    return ones - (1 << 64) if ones >> 63 else ones


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
    if codes.device.type == "meta" or codes.numel() == 0:
        return
    # A code that is out of range would run over into its neighbours
    low, high = (int(bound) for bound in codes.aminmax())
    assert low >= -(1 << (bits - 1)), (low, bits)
    assert high < 1 << (bits - 1), (high, bits)
