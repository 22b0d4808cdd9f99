"""How far a quantized policy's actions are from the float policy's, on recorded observations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.statistics import percentiles_ms
from vlaquant.families.observation import Observation
from vlaquant.models.openvla import OpenVLAForActionPrediction, action_statistics, unnormalize

_WARM_UP_ACTIONS = 3


@dataclass(frozen=True, slots=True)
class ActionError:
    """Candidate against reference; actions in the dataset's units, bins in units of one of 255.

    Attributes:
        l1: mean absolute difference per action dimension.
        mse: mean squared difference per action dimension.
        token_agreement: share of identical action tokens.
        bin_distance: mean |difference| of bins.
        gripper_flips: share of actions whose last dimension changes sign.
        l1_to_demonstration: mean absolute difference of the candidate to the recorded action, all dimensions.
        reference_l1_to_demonstration: the same for the reference.
        observations: how many were compared.
    """

    l1: list[float]
    mse: list[float]
    token_agreement: float
    bin_distance: float
    gripper_flips: float
    l1_to_demonstration: float
    reference_l1_to_demonstration: float
    observations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the means over dimensions."""
        return asdict(self) | {"mean_l1": float(np.mean(self.l1)), "mean_mse": float(np.mean(self.mse))}


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one policy answers to each observation: tokens [n, count] and actions [n, chunk, dimension]."""

    tokens: NDArray[np.int64]
    actions: NDArray[np.float64]
    seconds: list[float]


def compare(
    candidate: OpenVLAForActionPrediction,
    reference: OpenVLAForActionPrediction,
    observations: Sequence[Observation],
    progress: Callable[[Sequence[Observation]], Sequence[Observation]],
) -> tuple[ActionError, dict[str, Any]]:
    """Ask both policies about every observation, in turn, so that their latencies share the machine's mood.

    Returns:
        The error, and the latency of one call of each: ``{"candidate": {p50_ms, p99_ms}, "reference": …, "ratio": …}``.

    Raises:
        EvaluationError: nothing to compare, or policies with different action spaces.
    """
    if not observations:
        raise EvaluationError("no observations to compare the policies on")
    demonstrated = [observation.action for observation in observations if observation.action is not None]
    missing = len(observations) - len(demonstrated)
    if missing:
        raise EvaluationError(f"{missing} of {len(observations)} observations hold no action to compare with")
    _check_same_actions(candidate, reference)
    for _ in range(_WARM_UP_ACTIONS):
        _ask(candidate, observations[0]), _ask(reference, observations[0])
    answers: dict[str, list[tuple[NDArray[np.int64], float]]] = {"candidate": [], "reference": []}
    for observation in progress(observations):
        answers["candidate"].append(_ask(candidate, observation))
        answers["reference"].append(_ask(reference, observation))
    stats = action_statistics(reference.config.norm_stats, observations[0].unnorm_key)
    predictions = {who: _predictions(reference, stats, pairs) for who, pairs in answers.items()}
    error = action_error(predictions["candidate"], predictions["reference"], np.stack(demonstrated), reference)
    latency: dict[str, Any] = {who: percentiles_ms(prediction.seconds) for who, prediction in predictions.items()}
    latency["ratio"] = latency["reference"]["p50_ms"] / latency["candidate"]["p50_ms"]
    return error, latency


def action_error(
    candidate: Predictions,
    reference: Predictions,
    demonstrated: NDArray[np.float64],
    model: OpenVLAForActionPrediction,
) -> ActionError:
    """The figures of :class:`ActionError` from the answers of both policies."""
    difference = candidate.actions - reference.actions  # [n, chunk, dimension]
    bins = [model.action_tokens.bins(answer.tokens) for answer in (candidate, reference)]
    target = demonstrated.reshape(difference.shape)
    return ActionError(
        l1=np.abs(difference).mean(axis=(0, 1)).tolist(),
        mse=np.square(difference).mean(axis=(0, 1)).tolist(),
        token_agreement=float((candidate.tokens == reference.tokens).mean()),
        bin_distance=float(np.abs(bins[0] - bins[1]).mean()),
        gripper_flips=float((np.sign(candidate.actions[..., -1]) != np.sign(reference.actions[..., -1])).mean()),
        l1_to_demonstration=float(np.abs(candidate.actions - target).mean()),
        reference_l1_to_demonstration=float(np.abs(reference.actions - target).mean()),
        observations=len(difference),
    )


def _ask(model: OpenVLAForActionPrediction, observation: Observation) -> tuple[NDArray[np.int64], float]:
    dimension = len(action_statistics(model.config.norm_stats, observation.unnorm_key)["low"])
    started = perf_counter()
    input_ids, pixel_values = model.encode(observation.image, observation.instruction)
    tokens = model.predict_tokens(input_ids, pixel_values, count=dimension * model.config.action_chunk)
    if tokens.is_cuda:
        torch.cuda.synchronize()
    return tokens.cpu().numpy(), perf_counter() - started


def _predictions(
    model: OpenVLAForActionPrediction,
    stats: Mapping[str, NDArray[Any]],
    answers: list[tuple[NDArray[np.int64], float]],
) -> Predictions:
    tokens = np.stack([tokens for tokens, _ in answers])
    normalized = model.action_tokens.decode(tokens).reshape(len(tokens), -1, len(stats["low"]))
    return Predictions(tokens, unnormalize(normalized, stats), [seconds for _, seconds in answers])


def _check_same_actions(candidate: OpenVLAForActionPrediction, reference: OpenVLAForActionPrediction) -> None:
    for field in ("norm_stats", "action_chunk", "n_action_bins", "action_decoding"):
        if getattr(candidate.config, field) != getattr(reference.config, field):
            raise EvaluationError(f"the policies differ in {field}, so their actions cannot be compared")
