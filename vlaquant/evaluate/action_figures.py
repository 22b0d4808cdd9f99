"""Figures of the actions that two policies answered: how far apart they are, and how smooth each of them is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.figures import (
    ACTION,
    ACTIONS,
    BINS,
    OBSERVATIONS,
    SHARE,
    SQUARED_ACTION,
    Compared,
    Figure,
    Groups,
    compared_means,
    mean,
)
from vlaquant.evaluate.results import ActionErrors, ActionFigures

#: Differences that a jerk is the third of.
_ORDER = 3


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one policy answers: actions [n, chunk, dimension], and bins [n, tokens] of one that chooses tokens."""

    actions: NDArray[np.float64]
    bins: NDArray[np.int64] | None
    seconds: list[float]


def action_figures(
    candidate: Predictions, reference: Predictions, demonstrated: NDArray[np.float64], episodes: Groups
) -> ActionFigures:
    """The figures of both policies' answers to the same observations, which are in the order of their recording.

    Actions are in the units of the robot, bins in units of one of 255. Means are over observations, steps of the chunk
    and dimensions. The last dimension is the gripper; it flips if its sign differs.

    Args:
        candidate: answers of the quantized policy.
        reference: answers of the float one.
        demonstrated: what was recorded, [n, dimension] or [n, steps, dimension].
        episodes: of the observations.

    Raises:
        EvaluationError: the recorded actions are of another dimension.
    """
    difference = candidate.actions - reference.actions  # [n, chunk, dimension]
    count, chunk, dimension = difference.shape
    if demonstrated.shape[-1] != dimension:
        raise EvaluationError(
            f"the policies give {dimension} numbers an action, the recordings hold {demonstrated.shape[-1]}"
        )
    target = demonstrated.reshape(count, -1, dimension)[:, :chunk]
    apart = [_each(np.abs(one.actions[:, : target.shape[1]] - target)) for one in (reference, candidate)]
    flips = np.sign(candidate.actions[..., -1]) != np.sign(reference.actions[..., -1])
    agreement = distance = None
    if candidate.bins is not None and reference.bins is not None:
        bins = np.abs(candidate.bins - reference.bins)
        agreement = mean(_each(bins == 0), episodes, SHARE, OBSERVATIONS)
        distance = mean(_each(bins), episodes, BINS, OBSERVATIONS)
    return ActionFigures(
        observations=count,
        episodes=episodes.count,
        chunk=chunk,
        dimensions=dimension,
        whole_chunk=_errors(difference, episodes),
        first_step=_errors(difference[:, :1], episodes),
        token_agreement=agreement,
        bin_distance=distance,
        gripper_flips=mean(_each(flips), episodes, SHARE, OBSERVATIONS),
        demonstration=compared_means(apart[0], apart[1], episodes, ACTION, OBSERVATIONS),
        boundary_jump=boundary_jump(reference.actions, candidate.actions, episodes),
        jerk=jerk(reference.actions, candidate.actions, episodes),
    )


def _each(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """The mean of each observation's numbers, [n]."""
    found: NDArray[np.float64] = values.reshape(len(values), -1).mean(axis=1, dtype=np.float64)
    return found


def _errors(difference: NDArray[np.float64], episodes: Groups) -> ActionErrors:
    absolute, squared = np.abs(difference), np.square(difference)

    def each(values: NDArray[np.float64], unit: str) -> tuple[Figure, ...]:
        return tuple(mean(_each(values[..., d]), episodes, unit, OBSERVATIONS) for d in range(values.shape[-1]))

    return ActionErrors(
        l1=mean(_each(absolute), episodes, ACTION, OBSERVATIONS),
        mse=mean(_each(squared), episodes, SQUARED_ACTION, OBSERVATIONS),
        l1_by_dimension=each(absolute, ACTION),
        mse_by_dimension=each(squared, SQUARED_ACTION),
    )


def boundary_jump(reference: NDArray[np.float64], candidate: NDArray[np.float64], episodes: Groups) -> Compared | None:
    """Mean |aᵢ₊₁[0] − aᵢ[last]|: how far the first action of a chunk is from the last one of the chunk before.

    Consecutive observations of an episode count as the moments at which the robot asks. If they were recorded at other
    intervals than the chunk's, only the ratio says something.

    Args:
        reference: answers of the float policy [n, chunk, dimension].
        candidate: answers of the quantized one.
        episodes: of the observations.

    Returns:
        None if no episode has two observations.

    Source: the discontinuity between chunks that real-time chunking measures (Black et al. 2025, arXiv:2506.07339).
    """
    same = np.flatnonzero(episodes.index[1:] == episodes.index[:-1])
    if len(same) == 0:
        return None
    jumps = [np.abs(one[same + 1, 0] - one[same, -1]).mean(axis=-1) for one in (reference, candidate)]
    between = Groups.of(episodes.index[same].tolist())
    return compared_means(jumps[0], jumps[1], between, ACTION, "chunk boundaries")


def jerk(reference: NDArray[np.float64], candidate: NDArray[np.float64], episodes: Groups) -> Compared | None:
    """Mean |aₜ₊₃ − 3 aₜ₊₂ + 3 aₜ₊₁ − aₜ| along the chunks of each episode, one after the other.

    The third difference of what is commanded: a policy that trembles has more of it. Where actions are velocities or
    differences of positions it is of a higher order than a jerk; the ratio of both policies means the same.

    Args:
        reference: answers of the float policy [n, chunk, dimension].
        candidate: answers of the quantized one.
        episodes: of the observations.

    Returns:
        None if no episode has four actions.

    Source: finite differences; Flash and Hogan 1985 for jerk as the measure of smoothness.
    """
    found: dict[str, list[NDArray[np.float64]]] = {"reference": [], "candidate": []}
    owners: list[int] = []
    for episode in range(episodes.count):
        mine = episodes.index == episode
        if mine.sum() * reference.shape[1] <= _ORDER:
            continue
        for who, actions in (("reference", reference), ("candidate", candidate)):
            trace = actions[mine].reshape(-1, actions.shape[-1])
            found[who].append(np.abs(np.diff(trace, n=_ORDER, axis=0)).mean(axis=-1))
        owners += [episode] * len(found["reference"][-1])
    if not owners:
        return None
    before, after = (np.concatenate(found[who]) for who in ("reference", "candidate"))
    return compared_means(before, after, Groups.of(owners), ACTION, ACTIONS)
