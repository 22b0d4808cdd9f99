"""How far the output of a Linear moves when its weight, and maybe its input, is rounded."""

from torch import Tensor


def weight_loss(delta: Tensor, hessian: Tensor) -> float:
    """tr(ΔW·H·ΔWᵀ): the squared error of the output, summed over n, averaged over the tokens that made H.

    Args:
        delta: [n, k], rounded weight minus weight.
        hessian: [k, k], mean of x·xᵀ.
    """
    return float(((delta @ hessian) * delta).sum())


def output_loss(x: Tensor, weight: Tensor, rounded_x: Tensor, rounded_weight: Tensor) -> float:
    """Mean over tokens of ‖x·Wᵀ − x̂·Ŵᵀ‖²: equals :func:`weight_loss` if x̂ = x and H is that of ``x``.

    Args:
        x: [t, k], a sample of the input.
        weight: [n, k].
        rounded_x: [t, k]; may be scaled by 1/s if ``rounded_weight`` is scaled by s.
        rounded_weight: [n, k].
    """
    error = x @ weight.T - rounded_x @ rounded_weight.T
    return float(error.square().sum(dim=-1).mean())
