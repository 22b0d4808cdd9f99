"""How far a quantized policy's actions are from the float policy's, on recorded observations."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.statistics import percentiles_ms
from vlaquant.families import family_of_model
from vlaquant.families.observation import Observation
from vlaquant.models.openvla import OpenVLAForActionPrediction, action_statistics, unnormalize

_WARM_UP_ACTIONS = 3


@dataclass(frozen=True, slots=True)
class ActionError:
    """Candidate against reference; actions in the dataset's units, bins in units of one of 255.

    Attributes:
        l1: mean absolute difference per action dimension.
        mse: mean squared difference per action dimension.
        token_agreement: share of identical action tokens; None for policies without.
        bin_distance: mean |difference| of bins; None for policies without.
        gripper_flips: share of actions whose last dimension changes sign.
        l1_to_demonstration: mean absolute difference of the candidate to the recorded action, all dimensions, as many
            steps as were recorded.
        reference_l1_to_demonstration: the same for the reference.
        observations: how many were compared.
    """

    l1: list[float]
    mse: list[float]
    token_agreement: float | None
    bin_distance: float | None
    gripper_flips: float
    l1_to_demonstration: float
    reference_l1_to_demonstration: float
    observations: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the means over dimensions."""
        return asdict(self) | {"mean_l1": float(np.mean(self.l1)), "mean_mse": float(np.mean(self.mse))}


@dataclass(frozen=True, slots=True, eq=False)
class Predictions:
    """What one policy answers: actions [n, chunk, dimension], and bins [n, tokens] of one that chooses tokens."""

    actions: NDArray[np.float64]
    bins: NDArray[np.int64] | None
    seconds: list[float]


def compare(
    candidate: nn.Module,
    reference: nn.Module,
    observations: Sequence[Observation],
    progress: Callable[[Sequence[Observation]], Sequence[Observation]],
) -> tuple[ActionError, dict[str, Any]]:
    """Ask both policies about every observation, in turn, so that their latencies share the machine's mood.

    Noise that an action starts from depends on the observation alone, so both start from the same.

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
    policies = {"candidate": candidate, "reference": reference}
    for policy in [*policies.values()] * _WARM_UP_ACTIONS:
        ask(policy, observations[0])
    answers: dict[str, list[Predictions]] = {who: [] for who in policies}
    for observation in progress(observations):
        for who, policy in policies.items():
            answers[who].append(ask(policy, observation))
    predictions = {who: _joined(found) for who, found in answers.items()}
    error = action_error(predictions["candidate"], predictions["reference"], np.stack(demonstrated))
    latency: dict[str, Any] = {who: percentiles_ms(prediction.seconds) for who, prediction in predictions.items()}
    latency["ratio"] = latency["reference"]["p50_ms"] / latency["candidate"]["p50_ms"]
    return error, latency


def action_error(candidate: Predictions, reference: Predictions, demonstrated: NDArray[np.float64]) -> ActionError:
    """The figures of :class:`ActionError` from the answers of both policies.

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
    steps = target.shape[1]
    bins = None
    if candidate.bins is not None and reference.bins is not None:
        bins = candidate.bins - reference.bins
    return ActionError(
        l1=np.abs(difference).mean(axis=(0, 1)).tolist(),
        mse=np.square(difference).mean(axis=(0, 1)).tolist(),
        token_agreement=None if bins is None else float((bins == 0).mean()),
        bin_distance=None if bins is None else float(np.abs(bins).mean()),
        gripper_flips=float((np.sign(candidate.actions[..., -1]) != np.sign(reference.actions[..., -1])).mean()),
        l1_to_demonstration=float(np.abs(candidate.actions[:, :steps] - target).mean()),
        reference_l1_to_demonstration=float(np.abs(reference.actions[:, :steps] - target).mean()),
        observations=count,
    )


def ask(model: Any, observation: Observation) -> Predictions:
    """The answer to one observation, n = 1; seconds are from the observation to the action."""
    if chooses_tokens(model):
        return _ask_for_tokens(model, observation)
    family = family_of_model(model)
    assert family.act is not None  # _check_same_actions
    started = perf_counter()
    action = family.act(model, family.inputs(model, observation)).double().cpu()
    return Predictions(action.numpy()[None], None, [perf_counter() - started])


def _ask_for_tokens(model: OpenVLAForActionPrediction, observation: Observation) -> Predictions:
    stats = action_statistics(model.config.norm_stats, observation.unnorm_key)
    dimension = len(stats["low"])
    started = perf_counter()
    images = [image for image in observation.images if image is not None]  # `encode` says how many it wants
    input_ids, pixel_values = model.encode(images, observation.instruction)
    found = model.predict_tokens(input_ids, pixel_values, count=dimension * model.config.action_chunk)
    tokens = found.cpu().numpy()
    seconds = perf_counter() - started
    normalized = model.action_tokens.decode(tokens).reshape(1, -1, dimension)
    return Predictions(unnormalize(normalized, stats), model.action_tokens.bins(tokens)[None], [seconds])


def _joined(answers: list[Predictions]) -> Predictions:
    bins = [answer.bins for answer in answers if answer.bins is not None]
    return Predictions(
        np.concatenate([answer.actions for answer in answers]),
        np.concatenate(bins) if bins else None,
        [seconds for answer in answers for seconds in answer.seconds],
    )


def chooses_tokens(model: nn.Module) -> bool:
    """Whether a policy's action is made of tokens."""
    return isinstance(model, OpenVLAForActionPrediction) and model.config.action_decoding != "regression"


def _check_same_actions(candidate: Any, reference: Any) -> None:
    if type(candidate) is not type(reference):
        kinds = f"{type(candidate).__name__} and {type(reference).__name__}"
        raise EvaluationError(f"the policies are of different classes, {kinds}, so their actions cannot be compared")
    if family_of_model(reference).act is None:
        raise EvaluationError(f"{type(reference).__name__} takes no actions; compare language models with --text")
    for field in ("norm_stats", "action_chunk", "n_action_bins", "action_decoding"):
        if getattr(candidate.config, field, None) != getattr(reference.config, field, None):
            raise EvaluationError(f"the policies differ in {field}, so their actions cannot be compared")
