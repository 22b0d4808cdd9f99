"""GPTAQ: GPTQ that also makes up for what earlier quantized layers changed in the input of a layer.

Source: Li et al. 2025, arXiv:2504.02692 ("asymmetric calibration"). With x what a layer reads in the float model and x̂
what it reads behind layers that are quantized already, GPTQ keeps ŵ·x̂ near w·x̂; here ŵ·x̂ is to be near w·x.

With H = E[x̂·x̂ᵀ], C = E[(x − x̂)·x̂ᵀ] and rows w, ŵ, by completing the square

    E(w·x − ŵ·x̂)² = (w' − ŵ)ᵀ·H·(w' − ŵ) + const,  w' = w·(I + C·H⁻¹),

so it is GPTQ on a shifted weight w', and nothing else changes. The damping λ of H belongs to the objective as in GPTQ:
it adds λ·‖w − ŵ‖², and the damped H takes the place of H, also in H⁻¹.

The paper (algorithm 1) adds a term to each step of GPTQ instead. Once column q is rounded, the columns R behind it take
over what they can of its drift, c_q·C_qR·(H_RR)⁻¹, where c_q is its value just before it was rounded. So neither column
q nor those before it ever move for the drift of q, where w' is the best there is before rounding.
"""

import torch
from torch import Tensor

#: Rows of the weight that are solved together: a bound for memory.
_ROWS = 4096


def shifted_weight(weight: Tensor, cross: Tensor, L: Tensor, pivots: Tensor, order: Tensor, alpha: float) -> Tensor:
    """w·(I + α·C·H⁻¹) for the rows of a weight.

    Args:
        weight: [n, k], any float dtype; not changed.
        cross: C [k, k].
        L: [k, k], unit lower triangular, with H = L·diag(pivots)²·Lᵀ in the order below; what lies above its diagonal
            is not looked at.
        pivots: [k].
        order: [k], which column of the weight is which of L.
        alpha: 0 for none of the shift, 1 for all of it.

    Returns:
        [n, k], float32.
    """
    shifted = torch.empty(weight.shape, device=weight.device)
    place = order.argsort()
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].to(torch.float32)
        moved = (rows @ cross).T[order]
        moved = torch.linalg.solve_triangular(L, moved, upper=False, unitriangular=True)
        moved /= pivots.square().unsqueeze(-1)
        moved = torch.linalg.solve_triangular(L.T, moved, upper=True, unitriangular=True)
        shifted[start : start + _ROWS] = torch.add(rows, moved[place].T, alpha=alpha)
    return shifted
