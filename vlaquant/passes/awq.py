"""AWQ: scale up the few columns that meet large activations before rounding, and clip ranges by output error.

Source: Lin et al. 2023, arXiv:2306.00978, equations 4 and 5; grid, normalization and clipping as in the authors' code.
The error is that of the output over all calibration tokens, from their Hessian, where the authors run a few tokens
through the layer.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError
from vlaquant.numerics import Observer, QuantizedWeight, fake_quantize, min_max, qparams, quantize_weight
from vlaquant.passes.loss import row_losses
from vlaquant.scheme import Granularity, QuantSpec

_SMALLEST_SCALE = 1e-4
_MEASURED = 3
_CLIP_STEP = 0.05
# The authors stop at 50 %; with 2 bits the best range is often narrower.
_CLIP_SMALLEST = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class AwqResult:
    """The best scale of the grid.

    Attributes:
        scale: [k], float32: multiply the weights' columns by it, and divide the input.
        ratio: the exponent that made it; at 0 the scale is 1.
        loss: output error with it.
        loss_rtn: the same without a scale.
    """

    scale: Tensor
    ratio: float
    loss: float
    loss_rtn: float


def awq_scales(mean_abs: Tensor, grid: int = 20) -> list[tuple[float, Tensor]]:
    """Candidates (ratio, scale [k]) for ratio = 0, 1/grid, …: s = mean|X|^ratio / √(max·min), so that s lies around 1.

    A channel that is never active keeps the scale 1, and has no part in the normalization.
    """
    mean_abs = mean_abs.to(torch.float32)
    active = mean_abs > 0
    candidates = [(0.0, torch.ones_like(mean_abs))]
    if active.any():
        for step in range(1, grid):
            scale = mean_abs.pow(step / grid).clamp(min=_SMALLEST_SCALE)
            low, high = scale[active].aminmax()
            candidates.append((step / grid, torch.where(active, scale / (low * high).sqrt(), 1.0)))
    return candidates


def awq_scale(
    mean_abs: Tensor,
    loss: Callable[[Tensor], float],
    *,
    grid: int = 20,
    estimate: Callable[[Tensor], float] | None = None,
) -> AwqResult:
    """The scale with the least output error of everything that reads the input.

    Args:
        mean_abs: [k], mean of |x| over the tokens.
        loss: scale [k] -> output error with rounded weights (equation 4), and rounded inputs where the scheme has them.
        grid: how many exponents to try; the first is 0, so that the result is never worse than no scale.
        estimate: something cheaper than ``loss`` to choose by, in any unit. Only the best three by it, and no scale,
            are then compared by ``loss``.

    Raises:
        CalibrationError: the error without a scale is not finite.
    """
    candidates = awq_scales(mean_abs, grid)
    if estimate is not None:
        promising = sorted(candidates[1:], key=lambda candidate: _worst_if_nan(estimate(candidate[1])))
        candidates = [candidates[0], *promising[:_MEASURED]]
    tried = [(loss(scale), ratio, scale) for ratio, scale in candidates]
    loss_rtn = tried[0][0]
    if not abs(loss_rtn) < torch.inf:
        raise CalibrationError(
            f"the output error without a scale is {loss_rtn}; look for NaN or Inf in weights and data"
        )
    best, ratio, scale = min(tried, key=lambda entry: _worst_if_nan(entry[0]))
    return AwqResult(scale, ratio, best, loss_rtn)


def _worst_if_nan(loss: float) -> float:
    return loss if loss == loss else torch.inf


def awq_clip(weight: Tensor, hessian: Tensor, spec: QuantSpec, *, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Round a weight [n, k] to nearest, with the range of each group shrunk as far as its own output error falls."""
    return quantize_weight(weight, spec, scale_dtype=scale_dtype, observer=hessian_observer(hessian))


def hessian_observer(hessian: Tensor) -> Observer:
    """An observer for a whole weight [n, k] that weighs errors with the group's own block of ``hessian`` [k, k].

    Of the ranges 100 %, 95 % … 30 % of the full one it takes that with the least δᵀ·H_gg·δ. Groups are treated one by
    one, as in the paper: that the errors of two groups may add up is not seen.
    """
    hessian = hessian.to(torch.float32)

    def observe(groups: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        columns = groups.shape[1] * groups.shape[2]
        per_tensor = spec.granularity is Granularity.TENSOR
        assert (columns % len(hessian) if per_tensor else columns - len(hessian)) == 0, "only for a whole weight [n, k]"
        blocks = _diagonal_blocks(hessian, spec.group_size) if spec.group_size else None
        # Groups first, so that each is one contiguous matrix to multiply with its block
        groups = groups.to(torch.float32).transpose(0, 1).contiguous()
        low, high = min_max(groups)
        best_scale, best_zero = qparams(low, high, spec, dtype)
        best = torch.full_like(best_scale, torch.inf)
        for step in range(round((1.0 - _CLIP_SMALLEST) / _CLIP_STEP) + 1):
            ratio = 1.0 - step * _CLIP_STEP
            scale, zero = qparams(low * ratio, high * ratio, spec, dtype)
            delta = fake_quantize(groups, scale, zero, spec).sub_(groups)
            error = _block_loss(delta, blocks, hessian)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return best_scale.transpose(0, 1), best_zero.transpose(0, 1)

    return observe


def _diagonal_blocks(hessian: Tensor, group_size: int) -> Tensor:
    """[g, s, s], a view: the blocks of ``hessian`` that belong to one group each."""
    groups = len(hessian) // group_size
    return hessian.reshape(groups, group_size, groups, group_size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _block_loss(delta: Tensor, blocks: Tensor | None, hessian: Tensor) -> Tensor:
    """δᵀ·H_gg·δ of groups [g, n, s]: [g, n, 1]; without blocks, of rows [1, n, k] or of a whole weight [1, 1, n·k]."""
    if blocks is not None:
        return (delta @ blocks).mul_(delta).sum(dim=-1, keepdim=True)
    losses = row_losses(delta.reshape(-1, len(hessian)), hessian)
    return losses.reshape(1, delta.shape[1], -1).sum(dim=-1, keepdim=True)
