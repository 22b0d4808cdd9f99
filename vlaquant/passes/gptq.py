"""GPTQ: round one column at a time, and let the columns still to come make up for its error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; dead columns, damping and activation order as in the
authors' code. What differs does not change the idea:

* Algorithm 1 takes the factor U of H⁻¹ = UᵀU and passes the error of each column on to all later ones. Here H itself is
  factored, H = RRᵀ with R upper triangular (so R = U⁻¹), and each column fetches what the errors δ = w - ŵ of all
  earlier ones, counted from the original weight, leave to it: column j becomes w_j + Σ_{i<j} δ_i·R_ij / R_jj before it
  is rounded. The two are equal (Chen et al. 2025, arXiv:2507.18553, who call it Babai's nearest plane), and nothing is
  inverted.
* Columns lie in memory backwards and as rows. Backwards, because R read so is the ordinary Cholesky factor L.
* The block size changes speed and memory, but not the codes.
* In activation order the scales of a group are those of its original columns, and columns return to their places: the
  result is stored like any other and needs no index of groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.numerics import (
    OBSERVERS,
    Observer,
    QuantizedWeight,
    all_finite,
    as_quantized,
    fit_groups,
    quantize_weight,
    round_to_codes_,
)
from vlaquant.passes.gptaq import shifted_weight
from vlaquant.scheme import Granularity, QuantSpec

#: Damping grows tenfold until the Hessian can be factored, but not beyond this share of its mean diagonal.
MAX_DAMP = 1.0
_MIN_RETRY_DAMP = 1e-3
#: Columns that are corrected one by one, by those before them in the same few.
_FEW = 32
#: Rows of the weight that are solved together, and columns of a factor that are made together: bounds for memory.
_ROWS = 8192
_PANEL = 256


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    """Codes, and what it took to get them.

    Attributes:
        damp: the damping that was used: what was asked for, unless the Hessian needed more.
        dead_columns: input channels that were 0 for every token; their weights are rounded to nearest.
        fallback: why the weight was rounded to nearest instead; None if it was not.
        float64: whether the Hessian could be factored with this damping in float64 only.
    """

    weight: QuantizedWeight
    damp: float
    dead_columns: int
    fallback: str | None
    float64: bool = False


def gptq(
    weight: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    scale_dtype: torch.dtype,
    clip: str | Observer = "minmax",
    damp: float = 0.01,
    block_size: int = 128,
    act_order: bool = True,
    cross: Tensor | None = None,
    alpha: float = 1.0,
) -> GptqResult:
    """Codes for a weight [n, k] that keep its output, rather than the weight itself, near the original.

    Args:
        weight: [n, k], any float dtype; not changed.
        hessian: [k, k], mean of x·xᵀ over the calibration tokens (any positive factor gives the same codes).
        spec: bits, symmetry and groups.
        scale_dtype: what scales are stored in; codes are chosen against the stored values.
        clip: how ranges are chosen: the name of one of :data:`vlaquant.numerics.OBSERVERS`, or an observer, such as
            that of :func:`vlaquant.passes.awq.hessian_observer`, which fits whole weights and so needs ``act_order``.
        damp: share of the mean of the Hessian's diagonal that is added to the diagonal.
        block_size: columns that are corrected together for all errors before them. Without ``act_order`` that is a
            group, where there are groups.
        act_order: begin with the columns that see the largest activations, with the group scales fixed beforehand.
            Otherwise columns go in order, and the scales of a group are chosen at its turn, from the corrected weight.
        cross: [k, k], mean of (x − x̂)·x̂ᵀ where ``hessian`` is that of x̂: keep the output on x̂ near that of the weight
            on x. See :mod:`vlaquant.passes.gptaq`.
        alpha: share of this difference that is made up for.

    Raises:
        CalibrationError: the Hessian holds NaN or Inf.
        CheckpointError: the weight does.
    """
    _require_finite(weight, hessian)
    observer = OBSERVERS[clip] if isinstance(clip, str) else clip
    weight = weight.detach()
    factored = _factor(hessian, damp, act_order=act_order)
    if factored.L is None:
        plain = quantize_weight(weight, spec, scale_dtype=scale_dtype, observer=observer)
        return GptqResult(plain, factored.damp, factored.dead, f"{factored.trouble}; rounded to nearest")

    if cross is not None:
        weight = shifted_weight(weight, cross, factored.L, factored.pivots, factored.order, alpha)
    grow = not act_order and spec.granularity is Granularity.GROUP
    if grow:
        assert spec.group_size is not None
        block_size = spec.group_size
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale, zero = fit_groups(weight, spec, observer, scale_dtype)
    place = factored.order.argsort()
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        grid = _Grid(scale, zero, rows, spec, observer, scale_dtype)
        W = weight[rows].to(torch.float32).T.contiguous()[factored.order]
        solved = _round_columns(W, factored.L, grid, factored.order.tolist(), block_size=block_size, grow=grow)
        codes[rows] = solved[place].T.contiguous()
    quantized = as_quantized(codes, scale, zero, spec, scale_dtype)
    return GptqResult(quantized, factored.damp, factored.dead, None, factored.float64)


def _require_finite(weight: Tensor, hessian: Tensor) -> None:
    where = f"a weight of shape {list(weight.shape)}"
    if not all_finite(hessian):
        raise CalibrationError(f"the Hessian of {where} holds NaN or Inf; look at the calibration data")
    if not all_finite(weight):
        raise CheckpointError(f"{where} holds NaN or Inf; look at the checkpoint")


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """A factored Hessian.

    Attributes:
        L: [k, k], of the damped Hessian in the order below, its columns divided by its diagonal. What lies above the
            diagonal means nothing. None if it cannot be factored.
        pivots: [k], what the columns of L were divided by.
        order: [k], which column of the weight is which of L; the last one is to be rounded first.
        trouble: why L is None.
    """

    L: Tensor | None
    pivots: Tensor
    order: Tensor
    damp: float
    dead: int
    trouble: str = ""
    float64: bool = False


def _factor(hessian: Tensor, damp: float, *, act_order: bool) -> _Factor:
    """Factor with as little damping as it takes, and for each damping in float64 where float32 fails."""
    diagonal = hessian.diagonal().to(torch.float32)
    dead = diagonal == 0
    # Over the live columns: the arbitrary 1 of the dead ones must not set the damping.
    mean = float(diagonal[~dead].mean()) if not dead.all() else 0.0
    diagonal = diagonal.masked_fill(dead, 1.0)
    first_to_last = torch.arange(len(diagonal), device=diagonal.device)
    if act_order:
        first_to_last = torch.argsort(diagonal, descending=True, stable=True)
    order, dead_columns = first_to_last.flip(0), int(dead.sum())
    if mean == 0.0:
        return _Factor(None, diagonal, order, damp, dead_columns, "every input is 0")
    while True:
        for dtype in (torch.float32, torch.float64):
            L = _gathered(hessian, order, dtype)
            L.diagonal().copy_(diagonal[order].to(dtype) + damp * mean)
            if _cholesky_(L):
                pivots = L.diagonal().clone()
                L /= pivots
                L = L.to(torch.float32)
                if all_finite(L):
                    wide = dtype is torch.float64
                    return _Factor(L, pivots.to(torch.float32), order, damp, dead_columns, float64=wide)
        if damp >= MAX_DAMP:
            trouble = f"the Hessian is not positive definite, even with damping {damp:g}"
            return _Factor(None, diagonal, order, damp, dead_columns, trouble)
        damp = min(max(10.0 * damp, _MIN_RETRY_DAMP), MAX_DAMP)


def _gathered(matrix: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows and columns [k, k] in another order, without a second copy on the way."""
    gathered = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    for start in range(0, len(order), _PANEL):
        gathered[start : start + _PANEL] = matrix[order[start : start + _PANEL]].index_select(1, order)
    return gathered


def _cholesky_(H: Tensor) -> bool:
    """Put L with H = LLᵀ into the lower triangle of H, panel by panel; False if H is not positive definite.

    The same as ``torch.linalg.cholesky``, which takes a copy and, on a CPU, twice the time.
    """
    for start in range(0, len(H), _PANEL):
        panel = slice(start, start + _PANEL)
        H[start:, panel] -= H[start:, :start] @ H[panel, :start].T
        lower, info = torch.linalg.cholesky_ex(H[panel, panel])
        if info.any():
            return False
        H[panel, panel] = lower
        rest = slice(start + _PANEL, None)
        H[rest, panel] = torch.linalg.solve_triangular(lower.T, H[rest, panel], upper=True, left=False)
    return True


class _Grid:
    """The representable values of some rows: scale and zero point [n, g] of the whole weight, and views [g, n]."""

    def __init__(
        self, scale: Tensor, zero: Tensor, rows: slice, spec: QuantSpec, observer: Observer, scale_dtype: torch.dtype
    ) -> None:
        self.spec = spec
        self._observer = observer
        self._scale_dtype = scale_dtype
        self._stored = (scale[rows], zero[rows]) if spec.granularity is not Granularity.TENSOR else (scale, zero)
        self.scale, self.zero = (list(values.T.contiguous().unbind(0)) for values in self._stored)

    def group(self, column: int) -> int:
        """The group that a column of the weight belongs to."""
        return column // self.spec.group_size if self.spec.group_size else 0

    def refit_(self, group: int, columns: Tensor) -> None:
        """Choose the scales of one group anew, from its columns [s, n] as they are now."""
        fitted = self._observer(columns.T.unsqueeze(1), self.spec, self._scale_dtype)
        for values, stored in zip(fitted, self._stored, strict=True):
            stored[:, group] = values.flatten()
        self.scale[group], self.zero[group] = (values.flatten() for values in fitted)


def _round_columns(W: Tensor, L: Tensor, grid: _Grid, order: list[int], *, block_size: int, grow: bool) -> Tensor:
    """Algorithm 1: codes int8 [k, n]. Row j of ``W`` [k, n] is column ``order[j]`` of the weight; the last goes first.

    In every block, and in every few columns of it, what is behind them is corrected for by one matrix product.
    """
    k, n = W.shape
    groups = [grid.group(column) for column in order]
    codes = torch.empty(k, n, dtype=torch.int8, device=W.device)
    errors = torch.empty_like(W)
    for stop in range(k, 0, -block_size):
        start = max(stop - block_size, 0)
        block, behind = slice(start, stop), slice(stop, k)
        corrected = torch.addmm(W[block], L[behind, block].T, errors[behind])
        if grow:
            grid.refit_(groups[start], _if_free(W[block], corrected, L[block, block]))
        with _one_thread():
            for end in range(stop, start, -_FEW):
                begin = max(end - _FEW, start)
                few, behind = slice(begin, end), slice(end, stop)
                columns = corrected[begin - start : end - start]
                columns.addmm_(L[behind, few].T, errors[behind])
                _round_few_(columns, W[few], errors[few], L[few, few], grid, groups[few])
        codes[block] = corrected
    return codes


@contextmanager
def _one_thread() -> Iterator[None]:
    """For thousands of operations too small to share out: threads that wait for each other cost more than they help.

    Beside other programs on two cores, two threads made a block of SmolLM2 take 91 s instead of 5 s; like this, 20 s.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _if_free(W: Tensor, corrected: Tensor, L: Tensor) -> Tensor:
    """The best values of some columns [s, n] if none of them had to be rounded, as algorithm 1 has them at this point.

    ``corrected`` holds what the errors of earlier columns leave to each of them if those between keep their weight.
    """
    moved: Tensor = torch.linalg.solve_triangular(L.T, corrected - W, upper=True, unitriangular=True)
    return moved + W


def _round_few_(columns: Tensor, W: Tensor, errors: Tensor, L: Tensor, grid: _Grid, groups: list[int]) -> None:
    """Turn corrected ``columns`` [few, n] into codes, and note their ``errors`` against ``W``."""
    factors = L.T.contiguous()
    each = zip(columns.unbind(0), W.unbind(0), errors.unbind(0), groups, strict=True)
    for j, (column, original, error, group) in reversed(list(enumerate(each))):
        scale, zero = grid.scale[group], grid.zero[group]
        column.addmv_(errors[j + 1 :].T, factors[j, j + 1 :])
        column.div_(scale)
        round_to_codes_(column, zero, grid.spec)
        offset = column if grid.spec.symmetric else column - zero
        torch.addcmul(original, offset, scale, value=-1.0, out=error)
