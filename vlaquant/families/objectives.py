"""Scalars whose gradients say what matters to a decision: see :mod:`vlaquant.calibrate.token_weights`.

Each draws from torch's random numbers. In the mean over the draws, the square of its gradient is the curvature of the
distance between the decision and that of a slightly different model.
"""

import torch
from torch import Tensor

from vlaquant.families.base import Decision


def sampled_surprise(logits: Tensor) -> Tensor:
    """−Σ log p(y) of tokens y that are drawn from the model's own distributions, logits [..., vocabulary].

    Its squared gradient is the Fisher information, the curvature of the Kullback-Leibler divergence (Martens 2014,
    arXiv:1412.1193, section 5); with demonstrated tokens it would not be (Kunstner et al. 2019, arXiv:1905.12558).
    """
    log_p = logits.float().flatten(0, -2).log_softmax(dim=-1)
    drawn = torch.multinomial(log_p.detach().exp(), 1)
    return -log_p.gather(1, drawn).sum()


def random_direction(values: Tensor) -> Tensor:
    """Σ ±v with random signs: its squared gradient is that of Σv², for errors around the values that are there."""
    signs = torch.randint(0, 2, values.shape, device=values.device) * 2 - 1
    return (values.float() * signs).sum()


def objective(decision: Decision) -> Tensor:
    """The scalar of a decision: :func:`sampled_surprise` of tokens, :func:`random_direction` of numbers."""
    return sampled_surprise(decision.output) if decision.tokens else random_direction(decision.output)


def roots(errors: Tensor) -> Tensor:
    """Of squared errors [..., n], as numbers [rows, n]: they move as what was compared with a fixed target."""
    return (errors.float() + torch.finfo(torch.float32).tiny).sqrt().reshape(-1, errors.shape[-1])
