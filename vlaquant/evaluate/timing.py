"""Timing several paths fairly: interleaved, each round once a path, and what is told about the rounds."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: Clock -> seconds. ``cpu`` counts the time of all threads of this process, and only while they run: with one thread
#: it disregards other work on the machine.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


def interleave(paths: Mapping[str, Callable[[int], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """What each path returned in each round.

    Each round calls every path once and begins with another one than the round before, so that none always follows the
    same neighbour's leftovers from a cold start.

    Args:
        paths: name -> (number of the turn, counted from 0 with the warm-up) -> seconds.
        rounds: that count.
        warm_up: rounds before these.
    """
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    names = list(paths)
    for turn in range(warm_up + rounds):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            taken = paths[name](turn)
            if turn >= warm_up:
                seconds[name].append(taken)
    return seconds


def summary_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and minimum in milliseconds."""
    values = [1e3 * value for value in seconds]
    return {
        "median_ms": statistics.median(values),
        "p95_ms": float(np.percentile(values, 95)),
        "min_ms": min(values),
    }


def synchronize(device: str) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device != "cpu":
        torch.cuda.synchronize()


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """So many threads for torch, or as many as it has; gives the number, and puts back what was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def ratio(before: dict[str, Any] | None, after: dict[str, Any]) -> float | None:
    """How many times faster the second is, by medians; None without a first."""
    return None if before is None else float(before["median_ms"] / after["median_ms"])
