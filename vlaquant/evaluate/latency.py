"""How long one action takes, whole and by part of the policy."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from vlaquant.evaluate.figures import ACTIONS, HERTZ, MILLISECONDS, Compared, Figure, compared, quantile
from vlaquant.evaluate.parts import PartClock, borders, clocked, part_names
from vlaquant.evaluate.results import Percentiles, PolicyRate
from vlaquant.evaluate.timing import CLOCKS, interleave, synchronize

WARM_UP = 2


@dataclass(frozen=True, slots=True, eq=False)
class Version:
    """A policy, and one action of it with an observation's number."""

    model: nn.Module
    act: Callable[[int], Any]


def whole_turn(version: Version, device: str = "cpu", clock: str = "wall") -> Callable[[int], float]:
    """One action that nobody watches: number of the turn -> seconds."""

    def turn(number: int) -> float:
        synchronize(device)
        started = CLOCKS[clock]()
        version.act(number)
        synchronize(device)
        return CLOCKS[clock]() - started

    return turn


def part_turn(
    version: Version, kept: list[PartClock], device: str = "cpu", clock: str = "wall"
) -> Callable[[int], float]:
    """One action under a clock, which is kept: number of the turn -> seconds."""
    names = part_names(version.model)
    with clocked(version.model, names, PartClock()) as probe:
        version.act(0)
    watched = {name: names[name] for name in borders(probe.visits)}

    def turn(number: int) -> float:
        with clocked(version.model, watched, PartClock(device, clock)) as found:
            version.act(number)
        kept.append(found)
        return sum(found.seconds.values())

    return turn


def time_parts(versions: Mapping[str, Version], rounds: int) -> dict[str, list[PartClock]]:
    """The clocks of ``rounds`` actions of each version, taken in turn after a warm-up."""
    kept: dict[str, list[PartClock]] = {name: [] for name in versions}
    turns = {name: part_turn(version, kept[name]) for name, version in versions.items()}
    interleave(turns, rounds, warm_up=WARM_UP)
    return {name: clocks[WARM_UP:] for name, clocks in kept.items()}


def percentiles(
    reference: Sequence[float], candidate: Sequence[float], of: str = ACTIONS, calls: int = 1
) -> Percentiles:
    """Of the seconds that both took."""

    def at(share: float) -> Compared:
        both = [quantile([1e3 * one for one in seconds], share, MILLISECONDS, of) for seconds in (reference, candidate)]
        return compared(both[0], both[1])

    return Percentiles(at(0.5), at(0.95), at(0.99), calls)


def by_part(reference: Sequence[PartClock], candidate: Sequence[PartClock]) -> dict[str, Percentiles]:
    """Part -> percentiles, in the order in which an action runs through the parts."""
    found = {}
    for part in dict.fromkeys(part for clock in (*reference, *candidate) for part in clock.seconds):
        before, after = ([clock.seconds.get(part, 0.0) for clock in clocks] for clocks in (reference, candidate))
        found[part] = percentiles(before, after, calls=max(clock.calls(part) for clock in candidate))
    return found


def policy_rate(chunk: int, latency: Percentiles, control_hz: float | None) -> PolicyRate:
    """Actions a second that the policies supply, against what the robot executes."""

    def rate(of: Compared) -> Compared:
        return compared(_rate(chunk, of.reference), _rate(chunk, of.candidate))

    needed = None if control_hz is None else Figure(control_hz, HERTZ, 1, "robot")
    return PolicyRate(chunk, rate(latency.p50), rate(latency.p99), needed)


def _rate(chunk: int, latency: Figure) -> Figure:
    low, high = (None if end is None else 1e3 * chunk / end for end in (latency.high, latency.low))
    return Figure(1e3 * chunk / latency.value, HERTZ, latency.count, latency.of, low, high)
