"""Scales fitted once more when the codes are known.

Source: least squares. With q_g the codes of group g of a row (less the zero point, and 0 in all other columns), the row
is ŵ = Σ_g s_g·q_g, and its output error (w − ŵ)ᵀ·H·(w − ŵ) is least where Σ_h (q_gᵀ·H·q_h)·s_h = q_gᵀ·H·w for all g.
QuantVLA (arXiv:2602.20309) corrects the size of an output by one factor a layer; this is the best factor for every
group. It costs nothing at run time, as only the values of scales change.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vlaquant.numerics import QuantizedWeight, split_groups
from vlaquant.scheme import Granularity

#: How strongly scales are held where they are, as a share of the mean of q_gᵀ·H·q_g.
_HOLD = 1e-3
_VALUES = 1 << 24


def refit_scales(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> QuantizedWeight:
    """The same codes [n, k] with the scales [n, g] that give a row the least output error; per tensor as they are.

    A scale that would vanish or overflow in its dtype stays as it was.
    """
    if quantized.spec.granularity is Granularity.TENSOR:
        return quantized
    n, k = weight.shape
    groups = quantized.scale.shape[1]
    rows = max(_VALUES // (groups * k), 1)
    parts = [slice(start, start + rows) for start in range(0, n, rows)]
    scale = torch.cat([_fitted(weight[part], quantized.rows(part), hessian) for part in parts])
    return replace(quantized, scale=scale)


def _fitted(weight: Tensor, quantized: QuantizedWeight, hessian: Tensor) -> Tensor:
    """[n, g], in the dtype of the scales."""
    codes = split_groups(quantized.codes, quantized.spec).to(torch.float32)
    if quantized.zero is not None:
        codes -= quantized.zero.to(torch.float32).unsqueeze(-1)
    n, groups, size = codes.shape
    # q_gᵀ·H: [g, n, k]
    products = torch.bmm(codes.transpose(0, 1), hessian.to(torch.float32).reshape(groups, size, -1))
    A = torch.einsum("gnhs,nhs->ngh", products.reshape(groups, n, groups, size), codes).to(torch.float64)
    b = torch.einsum("gnk,nk->ng", products, weight.to(torch.float32)).to(torch.float64)
    hold = _HOLD * A.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True)
    # A row of zeros has nothing to fit
    hold = torch.where(hold > 0, hold, 1.0)
    old = quantized.scale.to(torch.float64)
    A.diagonal(dim1=1, dim2=2).add_(hold)
    found = torch.linalg.solve(A, b + hold * old).to(quantized.scale.dtype)
    usable = found.isfinite() & (found.abs() >= torch.finfo(found.dtype).smallest_normal)
    return torch.where(usable, found, quantized.scale)
