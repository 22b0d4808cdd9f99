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


def action_statistics(norm_stats: Mapping[str, Any], unnorm_key: str | None) -> dict[str, NDArray[Any]]:
    """``q01``, ``q99`` and ``mask`` of one dataset, each [action dimension].

    Raises:
        CheckpointError: no such dataset, or several and none named.
    """
    known = ", ".join(norm_stats) or "none"
    if unnorm_key is None:
        if len(norm_stats) != 1:
            raise CheckpointError(f"the checkpoint holds statistics of {known}; say which with unnorm_key")
        unnorm_key = next(iter(norm_stats))
    if unnorm_key not in norm_stats:
        raise CheckpointError(f"no statistics named {unnorm_key!r} in this checkpoint; it holds {known}")
    action = norm_stats[unnorm_key]["action"]
    q01 = np.asarray(action["q01"], dtype=np.float64)
    mask = np.asarray(action.get("mask", np.ones_like(q01, dtype=bool)), dtype=bool)
    return {"q01": q01, "q99": np.asarray(action["q99"], dtype=np.float64), "mask": mask}


def unnormalize(normalized: FloatArray, stats: Mapping[str, NDArray[Any]]) -> FloatArray:
    """[-1, 1] -> the dataset's units between its 1 % and 99 % quantiles; masked-out dimensions pass as they are."""
    low, high = stats["q01"], stats["q99"]
    return np.where(stats["mask"], 0.5 * (normalized + 1.0) * (high - low) + low, normalized)


def normalize(action: FloatArray, stats: Mapping[str, NDArray[Any]]) -> FloatArray:
    """Inverse of :func:`unnormalize`, clipped to [-1, 1]."""
    low, high = stats["q01"], stats["q99"]
    span = np.where(high > low, high - low, 1.0)
    return np.clip(np.where(stats["mask"], 2.0 * (action - low) / span - 1.0, action), -1.0, 1.0)
