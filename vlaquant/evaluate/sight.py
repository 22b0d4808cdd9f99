"""Whether a quantized policy still looks: how far its action moves when all images turn black."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.actions import ask, chooses_tokens, episodes_of
from vlaquant.evaluate.figures import ACTION, OBSERVATIONS, Compared, compared_means
from vlaquant.families import Observation, family_of_model

#: Images have at least this many dimensions: batch, colours, height, width. Noise has fewer.
_OF_IMAGES = 4


def image_sensitivity(
    candidate: nn.Module,
    reference: nn.Module,
    observations: Sequence[Observation],
    progress: Callable[[Sequence[Any]], Sequence[Any]],
) -> Compared:
    """Mean |a(images) − a(black images)| of both policies, and the ratio.

    The noise that an action starts from stays that of the real images. A policy gone blind has the ratio 0.

    Raises:
        EvaluationError: the reference does not look itself, or the observations hold no images.
    """
    changes: dict[str, list[float]] = {"reference": [], "candidate": []}
    for observation in progress(observations):
        for who, policy in (("reference", reference), ("candidate", candidate)):
            seen, black = ask(policy, observation).actions, _ask_in_the_dark(policy, observation)
            changes[who].append(float(np.abs(seen - black).mean()))
    before, after = (np.asarray(changes[who]) for who in ("reference", "candidate"))
    if not before.mean() > 0:
        raise EvaluationError("the float policy acts the same whatever it sees, so it is no measure of sight")
    return compared_means(before, after, episodes_of(observations), ACTION, OBSERVATIONS)


def _ask_in_the_dark(policy: Any, observation: Observation) -> NDArray[np.float64]:
    if not isinstance(observation, Observation):
        raise EvaluationError("image_sensitivity needs observations with images; this family's samples are tensors")
    images = tuple(None if image is None else Image.new(image.mode, image.size) for image in observation.images)
    dark = replace(observation, images=images)
    if chooses_tokens(policy):
        return ask(policy, dark).actions
    family = family_of_model(policy)
    assert family.act is not None  # ask() has seen to it
    inputs, blackened = family.inputs(policy, observation), family.inputs(policy, dark)
    pictures = {name: tensor for name, tensor in blackened.items() if tensor.ndim >= _OF_IMAGES}
    action: NDArray[np.float64] = family.act(policy, inputs | pictures).double().cpu().numpy()[None]
    return action
