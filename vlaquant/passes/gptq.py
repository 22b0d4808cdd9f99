"""GPTQ: round one column at a time, and let the columns still to come make up for its error.

Source: Frantar et al. 2022, arXiv:2210.17323, algorithm 1; dead columns, damping and activation order as in the
authors' code. Three things differ, none of which changes the idea:

* The factor U with H⁻¹ = UᵀU comes from one Cholesky factorization of H, read backwards, without inverting H. It is the
  same matrix (there is only one) at less cost; with the usual damping float32 gives six good digits of it.
* Blocks end where groups end, so that the block size changes speed and memory, but not the codes.
* In activation order the scales of a group are those of its original columns, and columns return to their places: the
  result is stored like any other and needs no index of groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.numerics import (
    OBSERVERS,
    Observer,
    QuantizedWeight,
    as_quantized,
    from_codes,
    quantize_weight,
    split_groups,
    to_codes,
)
from vlaquant.scheme import Granularity, QuantSpec

#: Damping grows tenfold until the Hessian can be factored, but not beyond this share of its mean diagonal.
MAX_DAMP = 1.0
_MIN_RETRY_DAMP = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class GptqResult:
    """Codes, and what it took to get them.

    Attributes:
        damp: the damping that was used: what was asked for, unless the Hessian needed more.
        dead_columns: input channels that were 0 for every token; their weights are rounded to nearest.
        fallback: why the weight was rounded to nearest instead; None if it was not.
    """

    weight: QuantizedWeight
    damp: float
    dead_columns: int
    fallback: str | None


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
        block_size: columns whose corrections reach the rest of the weight together.
        act_order: begin with the columns that see the largest activations, with the group scales fixed beforehand.
            Otherwise columns go in order, and the scales of a group are chosen at its turn, from the corrected weight.

    Raises:
        CalibrationError: the Hessian holds NaN or Inf.
        CheckpointError: the weight does.
    """
    _require_finite(weight, hessian)
    observer = OBSERVERS[clip] if isinstance(clip, str) else clip
    W = weight.detach().to(torch.float32, copy=True)
    H = hessian.to(torch.float32, copy=True)

    dead = H.diagonal() == 0
    dead_columns = int(dead.sum())
    # Over the live columns: the arbitrary 1 of the dead ones must not set the damping.
    mean = float(H.diagonal()[~dead].mean()) if dead_columns < len(H) else 0.0
    H.diagonal()[dead] = 1.0
    columns = torch.arange(len(H), device=H.device)
    order = torch.argsort(H.diagonal(), descending=True, stable=True) if act_order else columns
    U, damp, trouble = _inverse_factor(H[order][:, order], mean, damp)
    if U is None:
        plain = quantize_weight(weight, spec, scale_dtype=scale_dtype, observer=observer)
        return GptqResult(plain, damp, dead_columns, f"{trouble}; rounded to nearest")

    grid = _Grid(W, spec, observer, scale_dtype)
    grow = not act_order and spec.granularity is Granularity.GROUP
    if grow:
        block_size = max(block_size // grid.group_size, 1) * grid.group_size
    codes = torch.empty_like(W)
    codes[:, order] = _round_columns(W[:, order], U, grid, order.tolist(), block_size=block_size, grow=grow)
    return GptqResult(as_quantized(codes, grid.scale, grid.zero, spec, scale_dtype), damp, dead_columns, None)


def _require_finite(weight: Tensor, hessian: Tensor) -> None:
    where = f"a weight of shape {list(weight.shape)}"
    if not hessian.isfinite().all():
        raise CalibrationError(f"the Hessian of {where} holds NaN or Inf; look at the calibration data")
    if not weight.isfinite().all():
        raise CheckpointError(f"{where} holds NaN or Inf; look at the checkpoint")


def _inverse_factor(H: Tensor, mean: float, damp: float) -> tuple[Tensor | None, float, str]:
    """Upper triangular U with (H + damp·mean·I)⁻¹ = UᵀU and the damping that it took; or None, and why."""
    if mean == 0.0:
        return None, damp, "every input is 0"
    while True:
        # With rows and columns reversed, L·Lᵀ becomes R·Rᵀ with R upper triangular, and U is the inverse of R.
        reversed_H = H.flip(0, 1)
        reversed_H.diagonal().add_(damp * mean)
        lower, info = torch.linalg.cholesky_ex(reversed_H)
        if not info.any():
            eye = torch.eye(len(H), device=H.device)
            U = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            if U.isfinite().all():
                return U, damp, ""
        if damp >= MAX_DAMP:
            return None, damp, f"the Hessian is not positive definite, even with damping {damp:g}"
        damp = min(max(10.0 * damp, _MIN_RETRY_DAMP), MAX_DAMP)


class _Grid:
    """The representable values: scale and zero point of each group, [n, g] ([n, 1] per channel, [1, 1] per tensor)."""

    def __init__(self, W: Tensor, spec: QuantSpec, observer: Observer, scale_dtype: torch.dtype) -> None:
        self.spec = spec
        self.group_size = spec.group_size or W.shape[1]
        self._observer = observer
        self._scale_dtype = scale_dtype
        scale, zero = self._observer(split_groups(W, spec), spec, scale_dtype)
        self.scale, self.zero = scale.squeeze(-1), zero.squeeze(-1)

    def refit_(self, group: int, columns: Tensor) -> None:
        """Choose the scales of one group anew, from its columns [n, s] as they are now."""
        scale, zero = self._observer(columns.unsqueeze(1), self.spec, self._scale_dtype)
        self.scale[:, group], self.zero[:, group] = scale.flatten(), zero.flatten()

    def round(self, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes [n] of a column [n], and the values that they stand for."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        codes = to_codes(column, scale, zero, self.spec)
        return codes, from_codes(codes, scale, zero)


def _round_columns(W: Tensor, U: Tensor, grid: _Grid, order: list[int], *, block_size: int, grow: bool) -> Tensor:
    """Algorithm 1: codes [n, k] of ``W``, which is used up. Column j of W is column ``order[j]`` of the weight."""
    codes = torch.empty_like(W)
    k = W.shape[1]
    for start in range(0, k, block_size):
        stop = min(start + block_size, k)
        errors = torch.empty_like(W[:, start:stop])
        for j in range(start, stop):
            group = order[j] // grid.group_size
            if grow and j % grid.group_size == 0:
                grid.refit_(group, W[:, j : j + grid.group_size])
            codes[:, j], rounded = grid.round(W[:, j], group)
            error = (W[:, j] - rounded) / U[j, j]
            rest_of_block = slice(j, stop)
            W[:, rest_of_block] -= torch.outer(error, U[j, rest_of_block])
            errors[:, j - start] = error
        later_blocks = slice(stop, k)
        W[:, later_blocks] -= errors @ U[start:stop, later_blocks]
    return codes
