"""Which frames of recorded episodes are used, where there are more than are wanted."""

from collections.abc import Sequence

import numpy as np

#: Start, middle and end of an episode.
_PHASES = 3


def choose_frames(lengths: Sequence[int], count: int, *, seed: int) -> list[tuple[int, int]]:
    """``count`` frames, spread over episodes and over the phases of each; all of them if there are no more.

    Episodes get equal shares, as far as they are long enough. An episode with a share of three or more is cut into as
    many pieces of equal length and gives one frame of each. With a smaller share its pieces are its start, middle and
    end, and episodes take turns in which of them they give. Where the shares cannot be equal, and for the place of a
    frame within its piece, the seed decides.

    Args:
        lengths: of the episodes, in frames.
        count: ≥ 1.
        seed: the same seed gives the same frames.

    Returns:
        (index of the episode, frame in it), ascending.
    """
    if sum(lengths) <= count:
        return [(episode, frame) for episode, length in enumerate(lengths) for frame in range(length)]
    rng = np.random.default_rng(seed)
    order = [int(episode) for episode in rng.permutation(len(lengths))]
    shares = _shares(lengths, count, order)
    chosen: list[tuple[int, int]] = []
    turn = 0
    for episode in order:
        share, length = shares[episode], lengths[episode]
        if share == 0:
            continue
        pieces = min(max(share, _PHASES), length)
        edges = [piece * length // pieces for piece in range(pieces + 1)]
        given = sorted((turn + step) % pieces for step in range(share))
        chosen += [(episode, int(rng.integers(edges[piece], edges[piece + 1]))) for piece in given]
        turn += share
    return sorted(chosen)


def _shares(lengths: Sequence[int], count: int, order: Sequence[int]) -> list[int]:
    """How many frames each episode gives: one more to each in turn, until all are given."""
    shares = [0] * len(lengths)
    while count:
        for episode in order:
            if count and shares[episode] < lengths[episode]:
                shares[episode] += 1
                count -= 1
    return shares
