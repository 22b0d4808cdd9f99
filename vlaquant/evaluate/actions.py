"""Asking policies for actions on recorded observations, and comparing their answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.action_figures import Predictions, action_figures
from vlaquant.evaluate.figures import Groups
from vlaquant.evaluate.results import ActionFigures
from vlaquant.families import family_of_model
from vlaquant.families.observation import Observation
from vlaquant.models.openvla import OpenVLAForActionPrediction, action_statistics, unnormalize

_WARM_UP_ACTIONS = 3


@dataclass(frozen=True, slots=True, eq=False)
class Answers:
    """What both policies answered, and what that means.

    Attributes:
        figures: of the difference.
        candidate: answers of the quantized policy.
        reference: answers of the float one.
    """

    figures: ActionFigures
    candidate: Predictions
    reference: Predictions


def compare(
    candidate: nn.Module,
    reference: nn.Module,
    observations: Sequence[Observation],
    progress: Callable[[Sequence[Observation]], Sequence[Observation]],
) -> Answers:
    """Ask both policies about every observation, in turn, so that their latencies share the machine's mood.

    Noise that an action starts from depends on the observation alone, so both start from the same.

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
    ours, theirs = (_joined(answers[who]) for who in ("candidate", "reference"))
    return Answers(action_figures(ours, theirs, np.stack(demonstrated), episodes_of(observations)), ours, theirs)


def episodes_of(observations: Sequence[Any]) -> Groups:
    """The episode of each observation; samples that are no observations are an episode each."""
    names = [
        (one.task, one.episode) if isinstance(one, Observation) else ("", number)
        for number, one in enumerate(observations)
    ]
    return Groups.of(names)


def ask(model: Any, observation: Observation) -> Predictions:
    """The answer to one observation, n = 1; seconds are from the observation to the action."""
    if chooses_tokens(model):
        return _ask_for_tokens(model, observation)
    family = family_of_model(model)
    if family.act is None:
        raise EvaluationError(f"{type(model).__name__} takes no actions")
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
    actions: NDArray[np.float64] = np.concatenate([answer.actions for answer in answers])
    seconds = [seconds for answer in answers for seconds in answer.seconds]
    return Predictions(actions, np.concatenate(bins) if bins else None, seconds)


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
