"""Rounding that lets gradients through: forward it rounds, backward it does as if it had not.

Source: Bengio et al. 2013, arXiv:1308.3432; where values are clamped the gradient is 0, as in Esser et al. 2020,
arXiv:1902.08153, equation 3, which also gives that of the scale.
"""

import torch
from torch import Tensor

from vlaquant.numerics import min_max, qparams
from vlaquant.scheme import QuantSpec


def round_through(x: Tensor) -> Tensor:
    """``x.round()``, with the gradient of ``x``. Exact: what is added to x is a multiple of its last place."""
    return x + (x.round() - x).detach()


def fake_quantize_through(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    """As :func:`vlaquant.numerics.fake_quantize`, with gradients.

    Where x / S + Z rounds to a code, ∂x̂/∂x = 1 and ∂x̂/∂S = q - Z - x / S; where it is clamped, 0 and q - Z.
    """
    scaled = x.to(torch.float32) / scale + zero
    codes = round_through(scaled).clamp(spec.qmin, spec.qmax)
    return (codes - zero) * scale


def round_input(x: Tensor, spec: QuantSpec, static: tuple[Tensor, Tensor] | None) -> Tensor:
    """Activations x [..., k] after a round trip through their codes, in the dtype of x, with gradients for x.

    Args:
        x: what a layer reads.
        spec: of the activation.
        static: its scale and zero point; None for one range a token.
    """
    if static is None:
        low, high = min_max(x.detach())
        static = qparams(low, high, spec, torch.float32)
    return fake_quantize_through(x, *static, spec).to(x.dtype)
