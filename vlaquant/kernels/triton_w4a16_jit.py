"""The device code of :mod:`vlaquant.kernels.triton_w4a16`, which draws the layout that is read here.

Letters: t tokens, n out, k in, L lanes. ``words`` is int32 [n, blocks · L], ``scale`` and ``zero`` are [g, n]. A block
has 8 planes of L columns; ``GROUP_PLANES`` of them share a scale, or all planes of ``group_blocks`` blocks do.
"""

from __future__ import annotations  # there may be no Triton

from vlaquant.kernels.triton_common import jit, tl

# Triton allows no other annotations than those of its own
# mypy: disable-error-code="no-untyped-def"


@jit
def _codes(words, zero, nothing, plane: tl.constexpr):
    """Plane ``plane`` of int32 words as float32: u - 8 - zero, exactly.

    ``nothing`` is 0. Where no compiler can know that, the mask-and-or is one instruction, which has room for a single
    constant; else it is two. But then the code is not recognised as an operand of a dot that can stay in registers.
    """
    bit: tl.constexpr = 4 * plane if plane < 5 else 4 * plane - 12
    if plane >= 5:  # these would stick out of the mantissa
        words = words >> 12
    floats = ((words & (15 << bit)) | (nothing + ((150 - bit) << 23))).to(tl.float32, bitcast=True)
    return floats - (zero + (8 + (1 << (23 - bit))))


@jit
def _group_vector(pointer, group, rows, n):
    """Row ``group`` of a tensor [g, n], at ``rows``, as float32."""
    return tl.load(pointer + group.to(tl.int64) * n + rows, mask=rows < n, other=0).to(tl.float32)


@jit
def gemv_kernel(
    x, words, scale, zero, bias, y,
    tokens, n, k, blocks, split_blocks, group_blocks, nothing,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, GROUP_PLANES: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """To y [split, tokens, n]; instance (i, s, t) has rows i · BLOCK_N … and part s of k for token t."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    token = tl.program_id(2)
    lane = tl.arange(0, LANES)[None, :]
    row_words = words + rows.to(tl.int64)[:, None] * blocks * LANES
    inputs = x + token * k
    total = tl.zeros([BLOCK_N, LANES], tl.float32)
    for block in range(part * split_blocks, tl.minimum((part + 1) * split_blocks, blocks)):
        word = tl.load(row_words + block * LANES + lane, mask=rows[:, None] < n, other=0)  # [BLOCK_N, LANES]
        for group in tl.static_range(8 // GROUP_PLANES):
            index = block // group_blocks * (8 // GROUP_PLANES) + group
            offset = 0.0
            if HAS_ZERO:
                offset = _group_vector(zero, index, rows, n)[:, None]
            products = tl.zeros([BLOCK_N, LANES], tl.float32)
            for plane in tl.static_range(GROUP_PLANES):
                column = (block * 8 + group * GROUP_PLANES + plane) * LANES + lane
                values = tl.load(inputs + column, mask=column < k, other=0.0).to(tl.float32)
                products += values * _codes(word, offset, nothing, group * GROUP_PLANES + plane)
            total += products * _group_vector(scale, index, rows, n)[:, None]
    sums = tl.sum(total, axis=1)
    if HAS_BIAS:
        sums += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    tl.store(y + (part * tokens + token) * n + rows, sums.to(y.dtype.element_ty), mask=rows < n)


@jit
def gemm_kernel(
    x, words, scale, zero, bias, y,
    tokens, n, k, blocks, split_blocks, group_blocks,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LANES: tl.constexpr, GROUP_PLANES: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """To y [split, tokens, n], by tensor cores.

    The sum is kept transposed, [BLOCK_N, BLOCK_M]: the unpacked weight is then the left operand, which tensor cores
    take from registers, and few tokens fill the short side of their tile.
    """
    # Neighbouring instances share a tile of the weight: it comes from memory once
    token_blocks = tl.cdiv(tokens, BLOCK_M)
    rows = tl.program_id(0) // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.program_id(0) % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(1)
    lane = tl.arange(0, LANES)
    row_words = words + rows.to(tl.int64)[:, None] * blocks * LANES
    row_inputs = x + token.to(tl.int64)[None, :] * k
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(part * split_blocks, tl.minimum((part + 1) * split_blocks, blocks)):
        word = tl.load(row_words + block * LANES + lane[None, :], mask=rows[:, None] < n, other=0)  # [BLOCK_N, LANES]
        for group in tl.static_range(8 // GROUP_PLANES):
            index = block // group_blocks * (8 // GROUP_PLANES) + group
            offset = 0.0
            if HAS_ZERO:
                offset = _group_vector(zero, index, rows, n)[:, None]
            products = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for plane in tl.static_range(GROUP_PLANES):
                column = (block * 8 + group * GROUP_PLANES + plane) * LANES + lane[:, None]
                inputs = tl.load(row_inputs + column, mask=(token[None, :] < tokens) & (column < k), other=0.0)
                codes = _codes(word, offset, 0, group * GROUP_PLANES + plane)
                products = tl.dot(codes.to(DOT), inputs.to(DOT), products, input_precision="ieee")
            total += products * _group_vector(scale, index, rows, n)[:, None]
    if HAS_BIAS:
        total += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    at = (part * tokens + token).to(tl.int64)[None, :] * n + rows[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(token[None, :] < tokens) & (rows[:, None] < n))


@jit
def add_parts_kernel(parts, bias, y, count, n, SPLIT: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Adds parts float32 [SPLIT, count] up to y [count], the first part first; ``count`` is tokens · n."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count + at, mask=at < count, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + at % n, mask=at < count, other=0.0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < count)


@jit
def dequantize_kernel(
    words, scale, zero, weight,
    n, k, blocks, group_blocks,
    BLOCK_N: tl.constexpr, LANES: tl.constexpr, GROUP_PLANES: tl.constexpr, HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """The float weight [n, k], scaled in float32 and rounded once; instance (i, b) has rows i·BLOCK_N … of block b."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    lane = tl.arange(0, LANES)[None, :]
    wide = rows.to(tl.int64)[:, None]
    word = tl.load(words + (wide * blocks + block) * LANES + lane, mask=rows[:, None] < n, other=0)
    for group in tl.static_range(8 // GROUP_PLANES):
        index = block // group_blocks * (8 // GROUP_PLANES) + group
        offset = 0.0
        if HAS_ZERO:
            offset = _group_vector(zero, index, rows, n)[:, None]
        factor = _group_vector(scale, index, rows, n)[:, None]
        for plane in tl.static_range(GROUP_PLANES):
            column = (block * 8 + group * GROUP_PLANES + plane) * LANES + lane
            values = _codes(word, offset, 0, group * GROUP_PLANES + plane) * factor
            tl.store(weight + wide * k + column, values.to(weight.dtype.element_ty), mask=(wide < n) & (column < k))
