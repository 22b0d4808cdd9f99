"""Bias correction: what rounding a weight shifts on average is given back by the bias.

Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2: rounding W to Ŵ shifts the output by ε·E[x] with ε = Ŵ − W,
so that b − ε·E[x] is unbiased (equation 15 with the mean taken from data, their appendix D). Of the error
E‖ε·x‖² = ‖ε·E[x]‖² + tr(ε·C·εᵀ) with C the covariance of x, the bias takes the first term whatever ε is. What is left
to a quantizer is the second one, and so it is given C in place of the Hessian.

Only a Linear that has a bias is corrected: others gain no tensor that the readers of the format do not know.
"""

from dataclasses import replace

import torch

from vlaquant.calibrate.statistics import ActStats
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes.layer import Work


def centered(stats: ActStats) -> ActStats:
    """The same statistics with the covariance E[x·xᵀ] − E[x]·E[x]ᵀ as Hessian [k, k]."""
    if stats.hessian is None:
        return stats
    hessian = torch.addr(stats.hessian, stats.mean, stats.mean, alpha=-1.0)
    # A channel that is constant would be left with the rounding of its square
    hessian.diagonal().clamp_(min=0.0)
    return replace(stats, hessian=hessian)


def correct_bias_(work: Work, rounded: QuantizedWeight) -> None:
    """Make the bias b + (W − Ŵ)·E[x], where there is one and data for it."""
    if work.bias is not None and work.stats is not None:
        work.bias = work.bias + (work.weight - rounded.dequantize()) @ work.stats.mean
