"""How far the output of a Linear moves when its weight, and maybe its input, is rounded."""

import torch
from torch import Tensor

#: Columns of the Hessian, and values of the weight, that are multiplied at a time: a bound for memory.
_STRIP = 256
_VALUES = 1 << 20


def weight_loss(delta: Tensor, hessian: Tensor) -> float:
    """tr(ΔW·H·ΔWᵀ): the squared error of the output, summed over n, averaged over the tokens that made H.

    Args:
        delta: [n, k], rounded weight minus weight.
        hessian: [k, k], mean of x·xᵀ; symmetric, and only one half of it is used.
    """
    return sum(float(row_losses(delta[rows], hessian).sum(dtype=torch.float64)) for rows in slices(*delta.shape))


def slices(n: int, k: int) -> list[slice]:
    """The rows of [n, k] in slices whose products with a Hessian take little memory."""
    step = max(_VALUES // max(k, 1), 1)
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def row_losses(delta: Tensor, hessian: Tensor) -> Tensor:
    """δᵀ·H·δ for each row δ of [n, k]: [n], with half the arithmetic of a product with all of ``hessian``."""
    losses = torch.zeros(len(delta), device=delta.device)
    for start in range(0, delta.shape[1], _STRIP):
        strip = slice(start, start + _STRIP)
        products = delta[:, strip] @ hessian[strip, start:]
        products *= delta[:, start:]
        # Right of the diagonal block every pair of columns is met once, and inside twice
        losses += 2.0 * products.sum(dim=-1) - products[:, :_STRIP].sum(dim=-1)
    return losses


def row_losses_of_two(delta: Tensor, weight: Tensor, hessian: Tensor, cross: Tensor, drift: Tensor) -> Tensor:
    """Mean of (w·x − ŵ·x̂)² for each row, [n]: the output on x̂ against that of the float weight on x.

    As w·x − ŵ·x̂ = w·(x − x̂) − δ·x̂ with δ = ŵ − w, that is δᵀ·H·δ − 2·wᵀ·C·δ + wᵀ·D·w.

    Args:
        delta: [n, k], rounded weight minus weight.
        weight: [n, k], float32.
        hessian: H [k, k], mean of x̂·x̂ᵀ.
        cross: C [k, k], mean of (x − x̂)·x̂ᵀ.
        drift: D [k, k], mean of (x − x̂)·(x − x̂)ᵀ.
    """
    losses = row_losses(delta, hessian) + row_losses(weight, drift)
    # The three may cancel to the last bits
    return losses.sub_((weight @ cross).mul_(delta).sum(dim=-1), alpha=2.0).clamp_(min=0.0)


def output_loss(
    x: Tensor, weight: Tensor, rounded_x: Tensor, rounded_weight: Tensor, token_weights: Tensor | None = None
) -> float:
    """Mean over tokens of ‖x·Wᵀ − x̂·Ŵᵀ‖²: equals :func:`weight_loss` if x̂ = x and H is that of ``x``.

    Args:
        x: [t, k], a sample of the input.
        weight: [n, k].
        rounded_x: [t, k]; may be scaled by 1/s if ``rounded_weight`` is scaled by s.
        rounded_weight: [n, k].
        token_weights: [t], what each token counts for in the mean; None: all the same.
    """
    return token_mean((x @ weight.T - rounded_x @ rounded_weight.T).square().sum(dim=-1), token_weights)


def token_mean(values: Tensor, token_weights: Tensor | None) -> float:
    """Mean of ``values`` [t], with weights [t] where there are any; 0 if all tokens weigh nothing."""
    if token_weights is None:
        return float(values.mean())
    return float(values @ token_weights / token_weights.sum().clamp(min=torch.finfo(torch.float32).tiny))
