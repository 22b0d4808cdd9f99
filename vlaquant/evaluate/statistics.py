"""Intervals at 95 %: of rates, of paired rates, of quantiles, and of anything that is computed from episodes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
#: Low and high end; None where the data cannot say.
Interval = tuple[float, float]

_LEVEL = 0.95
_Z = 1.959963984540054
_TAILS = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
#: Resamples of a bootstrap, and the seed that they are drawn from.
_DRAWS, _SEED = 2000, 0


def wilson(successes: int, trials: int) -> Interval:
    """Interval of a rate, with ``trials`` ≥ 1 (Wilson 1927)."""
    rate = successes / trials
    middle = (rate + _Z**2 / (2 * trials)) / (1 + _Z**2 / trials)
    spread = np.sqrt(rate * (1 - rate) / trials + _Z**2 / (4 * trials**2))
    half = float(spread) * _Z / (1 + _Z**2 / trials)
    # At 0 and at n the ends are exactly 0 and 1, whatever rounding says
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == trials else middle + half)


def mcnemar(lost: int, won: int) -> float:
    """Exact p-value of McNemar's test (1947): of pairs that differ, each side is as likely as the other.

    Args:
        lost: pairs in which only the first succeeded.
        won: pairs in which only the second did.
    """
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0


def paired_rates(lost: int, won: int, pairs: int) -> Interval:
    """Interval of the difference (won − lost) / pairs of two rates that were measured in the same trials.

    The Wald interval with one more pair of each kind that differs. Without these, no differing pair at all would give
    an interval of width zero, however few pairs there are.

    Source: Bonett and Price 2012, Journal of Educational and Behavioral Statistics 37(4).
    """
    first, second = (lost + 1) / (pairs + 2), (won + 1) / (pairs + 2)
    difference = second - first
    half = _Z * float(np.sqrt((first + second - difference**2) / (pairs + 2)))
    return max(difference - half, -1.0), min(difference + half, 1.0)


def bootstrap(sums: Floats, figure: Callable[[Floats], Floats]) -> Interval | None:
    """Percentile interval of a figure, from episodes that are drawn with replacement (Efron 1979).

    Observations of one episode resemble each other, so whole episodes are drawn, not observations.

    Args:
        sums: what the figure is computed from, summed over each episode [episodes, k].
        figure: sums over all that was drawn [draws, k] -> the figure [draws].

    Returns:
        None for fewer than two episodes.
    """
    episodes = len(sums)
    if episodes < 2:
        return None
    times = np.random.default_rng(_SEED).multinomial(episodes, np.full(episodes, 1 / episodes), size=_DRAWS)
    values = np.sort(figure(times.astype(np.float64) @ sums))
    # By index and not by interpolation: values may be infinite
    low, high = (values[min(int(tail * _DRAWS), _DRAWS - 1)] for tail in _TAILS)
    return float(low), float(high)


def quantile_interval(values: Sequence[float] | Floats, share: float) -> tuple[float | None, float | None]:
    """Interval of a quantile that assumes no distribution, by counting (Conover 1999, section 3.2).

    Args:
        values: independent measurements, ≥ 1.
        share: such as 0.99.

    Returns:
        Low and high end; None for an end that so few values cannot bound.
    """
    from scipy.stats import binom

    ordered = np.sort(np.asarray(values, dtype=np.float64))
    below, above = (int(binom.ppf(tail, len(ordered), share)) for tail in _TAILS)
    low = float(ordered[below - 1]) if below >= 1 else None
    return low, float(ordered[above]) if above < len(ordered) else None


def divided(above: Any, below: Any) -> Floats:
    """Quotients, with 0 / 0 = 1 (both are the same) and x / 0 = ∞."""
    above, below = np.broadcast_arrays(np.asarray(above, np.float64), np.asarray(below, np.float64))
    out = np.where(above == 0, 1.0, np.where(np.isnan(above), np.nan, np.inf))
    np.divide(above, below, out=out, where=below != 0)
    return out
