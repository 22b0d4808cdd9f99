"""Action tokens ↔ actions: 256 uniform bins in [-1, 1], then the dataset's own units."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaquant.errors import CheckpointError

FloatArray = NDArray[np.float64]


class ActionTokens:
    """The last ``bins`` tokens of the vocabulary stand for actions, the last one for the lowest value.

    Source: OpenVLA (arXiv:2406.09246) §3.2. ``bins`` edges make ``bins − 1`` centres, so two tokens share the highest.
    """

    def __init__(self, bins: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.edges = np.linspace(-1.0, 1.0, bins)
        self.centers = (self.edges[:-1] + self.edges[1:]) / 2.0

    def encode(self, normalized: FloatArray) -> NDArray[np.int64]:
        """Normalised actions in [-1, 1] -> token ids, same shape."""
        bins = np.digitize(np.clip(normalized, -1.0, 1.0), self.edges)
        return np.asarray(self.vocab_size - bins, dtype=np.int64)

    def bins(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """Token ids -> bin index, 0 (lowest) to bins − 2; a token that is no action token goes to the nearest end."""
        return np.clip(self.vocab_size - tokens - 1, 0, len(self.centers) - 1)

    def decode(self, tokens: NDArray[np.int64]) -> FloatArray:
        """Token ids -> the centres of their bins, normalised actions in [-1, 1]."""
        return np.asarray(self.centers[self.bins(tokens)])


def action_statistics(
    norm_stats: Mapping[str, Any], unnorm_key: str | None, *, bounds: str = "q99"
) -> dict[str, NDArray[Any]]:
    """``low``, ``high`` and ``mask`` of one dataset's actions, each [action dimension].

    Args:
        norm_stats: of the checkpoint.
        unnorm_key: the dataset; None where there is only one.
        bounds: ``q99`` or ``min_max``.

    Raises:
        CheckpointError: no such dataset, or several and none named.
    """
    return _statistics(norm_stats, unnorm_key, "action", bounds)


def state_statistics(
    norm_stats: Mapping[str, Any], unnorm_key: str | None, *, bounds: str = "q99"
) -> dict[str, NDArray[Any]]:
    """As :func:`action_statistics` for the robot's state."""
    return _statistics(norm_stats, unnorm_key, "proprio", bounds)


def _statistics(
    norm_stats: Mapping[str, Any], unnorm_key: str | None, quantity: str, bounds: str
) -> dict[str, NDArray[Any]]:
    known = ", ".join(norm_stats) or "none"
    if unnorm_key is None:
        if len(norm_stats) != 1:
            raise CheckpointError(f"the checkpoint holds statistics of {known}; say which with unnorm_key")
        unnorm_key = next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        raise CheckpointError(f"no statistics named {unnorm_key!r} in this checkpoint; it holds {known}")
    names = {"q99": ("q01", "q99"), "min_max": ("min", "max")}[bounds]
    found = norm_stats[unnorm_key].get(quantity, {})
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(
            f"the statistics of {unnorm_key!r} lack {quantity}.{missing[0]}, which this policy needs; copy the "
            "dataset_statistics.json of its training beside its weights"
        )
    low, high = (np.asarray(found[name], dtype=np.float64) for name in names)
    return {"low": low, "high": high, "mask": np.asarray(found.get("mask", np.ones_like(low)), dtype=bool)}


def unnormalize(normalized: FloatArray, stats: Mapping[str, NDArray[Any]]) -> FloatArray:
    """[-1, 1] -> the dataset's units between ``low`` and ``high``; masked-out dimensions pass as they are."""
    low, high = stats["low"], stats["high"]
    return np.where(stats["mask"], 0.5 * (normalized + 1.0) * (high - low) + low, normalized)


def normalize(values: FloatArray, stats: Mapping[str, NDArray[Any]]) -> FloatArray:
    """Inverse of :func:`unnormalize`, clipped to [-1, 1]."""
    low, high = stats["low"], stats["high"]
    span = np.where(high > low, high - low, 1.0)
    return np.clip(np.where(stats["mask"], 2.0 * (values - low) / span - 1.0, values), -1.0, 1.0)
