"""What every figure of an evaluation is: a value with its unit, its count and, where it makes sense, its interval."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import PlainSerializer, WithJsonSchema

from vlaquant.evaluate.statistics import Floats, Interval, bootstrap, divided, quantile_interval


def _for_json(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


#: JSON has no infinity, which is the ratio of a signal to no noise at all; and a broken model's figures may be NaN.
Number = Annotated[
    float,
    PlainSerializer(_for_json, when_used="json"),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}),
]

ACTION, SQUARED_ACTION, SHARE, BINS, RATIO = "action", "action²", "share", "bins", "ratio"
MILLISECONDS, BYTES, DECIBELS, HERTZ, NATS = "ms", "bytes", "dB", "Hz", "nats/token"
OBSERVATIONS, EPISODES, ACTIONS = "observations", "episodes", "actions"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured figure.

    Attributes:
        value: of the figure.
        unit: of value, low and high.
        count: how many measurements are in it.
        of: what was counted.
        low: low end of the 95 % interval; None where there is none.
        high: its high end.
    """

    value: Number
    unit: str
    count: int
    of: str
    low: Number | None = None
    high: Number | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both models. Intervals of ratio and difference are of the pairs, where there are any.

    Attributes:
        reference: of the float model.
        candidate: of the quantized one.
        ratio: candidate / reference; 1 if both are 0.
        difference: candidate − reference.
    """

    reference: Figure
    candidate: Figure
    ratio: Figure
    difference: Figure


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """To which episode each measurement belongs: ``index`` [n], from 0 to ``count`` − 1."""

    index: NDArray[np.int64]
    count: int

    @classmethod
    def of(cls, names: Sequence[Hashable]) -> Self:
        """From the name of each measurement's episode."""
        known = {name: i for i, name in enumerate(dict.fromkeys(names))}
        return cls(np.array([known[name] for name in names], dtype=np.int64), len(known))

    def sums(self, *values: Floats) -> Floats:
        """Of each of the values [n], its sum over each episode: [count, number of values]."""
        found = [np.bincount(self.index, weights=one, minlength=self.count) for one in values]
        return np.stack(found, axis=1)


def counted(value: float, unit: str, count: int, of: str, interval: Interval | None = None) -> Figure:
    """A figure with an interval, if there is one."""
    low, high = interval or (None, None)
    return Figure(float(value), unit, count, of, low, high)


def mean(values: Floats, groups: Groups, unit: str, of: str) -> Figure:
    """The mean of values [n], with its bootstrap interval over episodes."""
    interval = bootstrap(groups.sums(values, np.ones(len(values))), lambda s: s[:, 0] / s[:, 1])
    return counted(float(np.mean(values)), unit, len(values), of, interval)


def compared_means(reference: Floats, candidate: Floats, groups: Groups, unit: str, of: str) -> Compared:
    """The means of paired values [n], with bootstrap intervals over episodes."""
    sums = groups.sums(reference, candidate, np.ones(len(reference)))
    before, after = mean(reference, groups, unit, of), mean(candidate, groups, unit, of)
    ratio = counted(
        float(divided(after.value, before.value)),
        RATIO,
        before.count,
        of,
        bootstrap(sums, lambda s: divided(s[:, 1], s[:, 0])),
    )
    apart = bootstrap(sums, lambda s: (s[:, 1] - s[:, 0]) / s[:, 2])
    return Compared(before, after, ratio, counted(after.value - before.value, unit, before.count, of, apart))


def compared(reference: Figure, candidate: Figure, apart: Interval | None = None) -> Compared:
    """Two figures of one unit; ``apart`` is the interval of their difference, if there is one."""
    count, of = min(reference.count, candidate.count), candidate.of
    return Compared(
        reference,
        candidate,
        counted(float(divided(candidate.value, reference.value)), RATIO, count, of),
        counted(candidate.value - reference.value, candidate.unit, count, of, apart),
    )


def quantile(values: Sequence[float] | Floats, share: float, unit: str, of: str) -> Figure:
    """A quantile of measurements, with an interval as far as they are enough."""
    low, high = quantile_interval(values, share)
    return Figure(float(np.quantile(np.asarray(values), share)), unit, len(values), of, low, high)
