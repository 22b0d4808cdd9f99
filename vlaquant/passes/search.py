"""Which of some scales is best: measured, never worse than no scale."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlaquant.errors import CalibrationError

_MEASURED = 3


@dataclass(frozen=True, slots=True, eq=False)
class BestScale:
    """The scale with the least output error.

    Attributes:
        scale: [k], float32: multiply the weights' columns by it, and divide the input.
        strength: the exponent that made it.
        loss: output error with it.
        loss_rtn: the same without a scale.
    """

    scale: Tensor
    strength: float
    loss: float
    loss_rtn: float


def best_scale(
    candidates: Sequence[tuple[float, Tensor]],
    loss: Callable[[Tensor], float],
    *,
    estimate: Callable[[Tensor], float] | None = None,
) -> BestScale:
    """The scale with the least output error of everything that reads the input.

    Args:
        candidates: (strength, scale [k]); the first is no scale, and wins if nothing is better.
        loss: scale [k] -> output error with rounded weights, and rounded inputs where the scheme has them.
        estimate: something cheaper than ``loss`` to choose by, in any unit. Only the best three by it, and no scale,
            are then compared by ``loss``.

    Raises:
        CalibrationError: the error without a scale is not finite.
    """
    if estimate is not None:
        promising = sorted(candidates[1:], key=lambda candidate: _worst_if_nan(estimate(candidate[1])))
        candidates = [candidates[0], *promising[:_MEASURED]]
    tried = [(loss(scale), strength, scale) for strength, scale in candidates]
    loss_rtn = tried[0][0]
    if not abs(loss_rtn) < torch.inf:
        raise CalibrationError(
            f"the output error without a scale is {loss_rtn}; look for NaN or Inf in weights and data"
        )
    best, strength, scale = min(tried, key=lambda entry: _worst_if_nan(entry[0]))
    return BestScale(scale, strength, best, loss_rtn)


def _worst_if_nan(loss: float) -> float:
    return loss if loss == loss else torch.inf
