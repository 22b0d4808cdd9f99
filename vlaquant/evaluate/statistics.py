"""Confidence intervals for success rates."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Rate:
    """A success rate with its Wilson interval at 95 % (Wilson 1927)."""

    successes: int
    episodes: int
    low: float
    high: float

    @property
    def rate(self) -> float:
        """Share of the episodes that succeeded."""
        return self.successes / self.episodes

    def __str__(self) -> str:
        return f"{self.rate:.1%} [{self.low:.1%}, {self.high:.1%}]"


def success_rate(successes: NDArray[np.bool_]) -> Rate:
    """Rate of True in [n]; n must be positive."""
    from scipy.stats import binomtest

    count = int(successes.sum())
    interval = binomtest(count, len(successes)).proportion_ci(confidence_level=0.95, method="wilson")
    return Rate(count, len(successes), float(interval.low), float(interval.high))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Two policies on the same episodes: who succeeded where the other failed, and McNemar's exact p-value.

    ``difference`` is candidate minus reference, with its 95 % interval (Wald, paired).
    """

    only_reference: int
    only_candidate: int
    p_value: float
    difference: float
    low: float
    high: float


def paired_difference(reference: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> PairedDifference:
    """McNemar's exact test on paired outcomes [n] (McNemar 1947): a binomial test of the discordant pairs."""
    from scipy.stats import binomtest

    lost = int((reference & ~candidate).sum())
    gained = int((~reference & candidate).sum())
    discordant = lost + gained
    p_value = float(binomtest(lost, discordant).pvalue) if discordant else 1.0
    n = len(reference)
    difference = (gained - lost) / n
    half = 1.96 * float(np.sqrt(max(discordant - (gained - lost) ** 2 / n, 0.0))) / n
    return PairedDifference(lost, gained, p_value, difference, difference - half, difference + half)


def percentiles_ms(seconds: list[float]) -> dict[str, Any]:
    """Median and 99th percentile in milliseconds."""
    values = np.asarray(seconds) * 1e3
    return {"p50_ms": float(np.percentile(values, 50)), "p99_ms": float(np.percentile(values, 99))}
