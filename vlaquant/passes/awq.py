"""AWQ: scale up the few columns that meet large activations before rounding, and clip ranges by output error.

Source: Lin et al. 2023, arXiv:2306.00978, equations 4 and 5; grid, normalization and clipping as in the authors' code.
The error is that of the output over all calibration tokens, from their Hessian, where the authors run a few tokens
through the layer.
"""

import torch
from torch import Tensor

from vlaquant.numerics import (
    Observer,
    QuantizedWeight,
    best_range,
    fake_quantize,
    min_max,
    quantize_weight,
    shrunken_ranges,
)
from vlaquant.passes.loss import row_losses
from vlaquant.scheme import Granularity, QuantSpec

_SMALLEST_SCALE = 1e-4
_CLIP_STEP = 0.05
# The authors stop at 50 %; with 2 bits the best range is often narrower.
_CLIP_SMALLEST = 0.3


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
        ratios = [1.0 - step * _CLIP_STEP for step in range(round((1.0 - _CLIP_SMALLEST) / _CLIP_STEP) + 1)]
        scale, zero = best_range(
            shrunken_ranges(*min_max(groups), spec, dtype, ratios),
            lambda scale, zero: _block_loss(fake_quantize(groups, scale, zero, spec).sub_(groups), blocks, hessian),
        )
        return scale.transpose(0, 1), zero.transpose(0, 1)

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
