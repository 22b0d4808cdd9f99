"""The device code of :mod:`vlaquant.kernels.triton_w8a8`.

Letters: t tokens, n out, k in. ``codes`` are int8 [t, k], ``weight`` is int8 [n, k].
"""

from __future__ import annotations  # there may be no Triton

from vlaquant.kernels.triton_common import jit, tl

# Triton allows no other annotations than those of its own
# mypy: disable-error-code="no-untyped-def"


@jit
def _round(values):
    """To the nearest integer, half to even, for absolute values below 2^22: beyond 1.5 · 2^23 floats are integers."""
    return (values + 12582912.0) - 12582912.0


@jit
def _write_codes(row, codes, k, scale, zero, block, LOWEST: tl.constexpr, BLOCK: tl.constexpr):
    """One block of a row as codes; clamped before it is rounded, which is the same and keeps ``_round`` in its range.

    NaN becomes 0.
    """
    column = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(row + column, mask=column < k, other=0.0).to(tl.float32)
    values = tl.div_rn(values, scale) + zero  # an ordinary division is not the IEEE one
    values = tl.where(values == values, values, 0.0)
    rounded = _round(tl.minimum(tl.maximum(values, LOWEST), 127.0))
    tl.store(codes + column, rounded.to(tl.int8), mask=column < k)


@jit
def quantize_tokens_kernel(
    x, codes, scale, zero, k, SMALLEST: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr
):
    """Instance t: the range of token t, then its codes. Scale float32 [t], NaN if there was one; zero int32 [t]."""
    token = tl.program_id(0).to(tl.int64)
    row = x + token * k
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    for block in range(tl.cdiv(k, BLOCK)):
        column = block * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(row + column, mask=column < k, other=0.0).to(tl.float32)
        low = tl.minimum(low, values)
        high = tl.maximum(high, values)
        wrong += (values != values).to(tl.int32)
    lowest = tl.min(low, axis=0)
    highest = tl.max(high, axis=0)
    largest = 3.4028234663852886e38
    offset = 0.0
    if SYMMETRIC:
        step = tl.div_rn(tl.maximum(-lowest, highest), 127.0)
        step = tl.minimum(tl.maximum(step, SMALLEST), largest)
    else:
        step = tl.div_rn(highest - lowest, 255.0)
        step = tl.minimum(tl.maximum(step, SMALLEST), largest)
        offset = -128.0 - tl.div_rn(lowest, step)
        offset = _round(tl.minimum(tl.maximum(offset, -128.0), 127.0))
        tl.store(zero + token, offset.to(tl.int32))
    for block in range(tl.cdiv(k, BLOCK)):
        _write_codes(row, codes + token * k, k, step, offset, block, -127.0 if SYMMETRIC else -128.0, BLOCK)
    tl.store(scale + token, tl.where(tl.sum(wrong, axis=0) > 0, float("nan"), step))


@jit
def quantize_static_kernel(x, codes, scale, zero, k, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr):
    """Instance (t, b): block b of token t, with a scale float32 [1] and a zero int32 [1] for all."""
    token = tl.program_id(0).to(tl.int64)
    offset = 0.0
    if not SYMMETRIC:
        offset = tl.load(zero).to(tl.float32)
    lowest: tl.constexpr = -127.0 if SYMMETRIC else -128.0
    _write_codes(x + token * k, codes + token * k, k, tl.load(scale), offset, tl.program_id(1), lowest, BLOCK)


@jit
def _scaled(
    sums, token, rows, x_scale, x_zero, scale, code_sums, bias,
    tokens, n, PER_TOKEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """int32 sums over k -> float32 results; ``token`` and ``rows`` broadcast against ``sums``."""
    at = token * PER_TOKEN  # of one scale for each token, or one for all
    if HAS_ZERO:
        zero = tl.load(x_zero + at, mask=token < tokens, other=0)
        sums -= zero * tl.load(code_sums + rows, mask=rows < n, other=0)
    results = sums.to(tl.float32) * tl.load(scale + rows, mask=rows < n, other=0.0)
    results *= tl.load(x_scale + at, mask=token < tokens, other=0.0)
    if HAS_BIAS:
        results += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
    return results


@jit
def gemv_kernel(
    codes, weight, x_scale, x_zero, scale, code_sums, bias, y,
    tokens, n, k, split_steps,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Instance (i, s, t) has rows i · BLOCK_N … and part s of k for token t.

    y is [tokens, n], or with ``PARTS`` the int32 sums [split, tokens, n].
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    token = tl.program_id(2)
    row_weight = weight + rows.to(tl.int64)[:, None] * k
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    for step in range(part * split_steps, tl.minimum((part + 1) * split_steps, tl.cdiv(k, BLOCK_K))):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        weights = tl.load(row_weight + column, mask=(rows[:, None] < n) & (column < k), other=0)
        inputs = tl.load(codes + token * k + column, mask=column < k, other=0)
        total += weights.to(tl.int32) * inputs.to(tl.int32)
    results = tl.sum(total, axis=1)
    if not PARTS:
        results = _scaled(
            results, token, rows, x_scale, x_zero, scale, code_sums, bias, tokens, n, PER_TOKEN, HAS_ZERO, HAS_BIAS
        )
    tl.store(y + (part * tokens + token) * n + rows, results.to(y.dtype.element_ty), mask=rows < n)


@jit
def gemm_kernel(
    codes, weight, x_scale, x_zero, scale, code_sums, bias, y,
    tokens, n, k, split_steps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """As :func:`gemv_kernel`, by tensor cores, with the sum transposed: few tokens fill the short side of a tile."""
    # Neighbouring instances share a tile of the weight: it comes from memory once
    token_blocks = tl.cdiv(tokens, BLOCK_M)
    rows = (tl.program_id(0) // token_blocks * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    token = (tl.program_id(0) % token_blocks * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
    part = tl.program_id(1)
    row_weight = weight + rows.to(tl.int64) * k
    row_codes = codes + token.to(tl.int64) * k
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for step in range(part * split_steps, tl.minimum((part + 1) * split_steps, tl.cdiv(k, BLOCK_K))):
        across = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        down = step * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
        weights = tl.load(row_weight + across, mask=(rows < n) & (across < k), other=0)
        inputs = tl.load(row_codes + down, mask=(token < tokens) & (down < k), other=0)
        total = tl.dot(weights, inputs, total, out_dtype=tl.int32)
    at = (part * tokens + token).to(tl.int64) * n + rows
    exists = (rows < n) & (token < tokens)
    if PARTS:
        tl.store(y + at, total, mask=exists)
    else:
        results = _scaled(
            total, token, rows, x_scale, x_zero, scale, code_sums, bias, tokens, n, PER_TOKEN, HAS_ZERO, HAS_BIAS
        )
        tl.store(y + at, results.to(y.dtype.element_ty), mask=exists)


@jit
def add_parts_kernel(
    parts, x_scale, x_zero, scale, code_sums, bias, y,
    tokens, count, n,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
    PER_TOKEN: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Adds parts int32 [SPLIT, tokens, n] up and scales them: y [tokens, n], ``count`` values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * count + at, mask=at < count, other=0)
    results = _scaled(
        total, at // n, at % n, x_scale, x_zero, scale, code_sums, bias, tokens, n, PER_TOKEN, HAS_ZERO, HAS_BIAS
    )
    tl.store(y + at, results.to(y.dtype.element_ty), mask=at < count)
