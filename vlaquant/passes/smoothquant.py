"""SmoothQuant: move the difficulty of outlier channels from activations into weights.

Source: Xiao et al. 2022, arXiv:2211.10438, equation 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

#: Scales stay within [1/limit, limit]: whatever they multiply has to survive in float16.
_LIMIT = 1e4


def smooth_scale(act_absmax: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """s_j = max|X_j|^α / max|W_j|^(1−α): divide the input's channel j by it and multiply the weights' column j.

    Args:
        act_absmax: [k], largest |x| of each input channel.
        weights: all weights [n_i, k] that read this input; they have to be scaled together.
        alpha: in [0, 1]; how much of the difficulty moves: at 1 every activation channel gets the range 1.

    Returns:
        [k], float32, positive. A channel that is never active, or that no weight reads, keeps the scale 1.
    """
    return _scale(act_absmax.to(torch.float32), _absmax_of_all(weights), alpha)


def smooth_scales(act_absmax: Tensor, weights: Sequence[Tensor], grid: int = 20) -> list[tuple[float, Tensor]]:
    """Candidates (α, scale [k]): no scale at all, and :func:`smooth_scale` for α = 0, 1/grid, … 1."""
    activation, weight = act_absmax.to(torch.float32), _absmax_of_all(weights)
    steps = [step / grid for step in range(grid + 1)]
    return [(0.0, torch.ones_like(activation)), *((alpha, _scale(activation, weight, alpha)) for alpha in steps)]


def _scale(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    scale = (activation.pow(alpha) / weight.pow(1.0 - alpha)).clamp(1.0 / _LIMIT, _LIMIT)
    return torch.where((activation > 0) & (weight > 0), scale, 1.0)


def _absmax_of_all(weights: Sequence[Tensor]) -> Tensor:
    return torch.stack([_absmax(w.detach().to(torch.float32)) for w in weights]).amax(dim=0)


def _absmax(weight: Tensor) -> Tensor:
    """[k], largest |w| of each column of [n, k], without a copy of it."""
    low, high = weight.amin(dim=0), weight.amax(dim=0)
    return torch.maximum(-low, high)
