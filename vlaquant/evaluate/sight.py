"""Whether a quantized policy still looks: how far its action moves when all images turn black."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from vlaquant.errors import EvaluationError
from vlaquant.evaluate.actions import Predictions, ask, chooses_tokens
from vlaquant.families import Observation, family_of_model

#: Images have at least this many dimensions: batch, colours, height, width. Noise has fewer.
_OF_IMAGES = 4


def image_sensitivity(
    candidate: nn.Module,
    reference: nn.Module,
    observations: Sequence[Observation],
    progress: Callable[[Sequence[Any]], Sequence[Any]],
) -> dict[str, float]:
    """Mean |change of a number of the action| under black images, of both policies, and the ratio.

    The noise that an action starts from stays that of the real images. A policy gone blind has the ratio 0.

    Raises:
        EvaluationError: the reference does not look itself, or the observations hold no images.
    """
    changes: dict[str, list[float]] = {"candidate": [], "reference": []}
    for observation in progress(observations):
        for who, policy in (("candidate", candidate), ("reference", reference)):
            seen, black = ask(policy, observation), _ask_in_the_dark(policy, observation)
            changes[who].append(float(np.abs(seen.actions - black).mean()))
    mean = {who: float(np.mean(values)) for who, values in changes.items()}
    if not mean["reference"] > 0:
        raise EvaluationError("the float policy acts the same whatever it sees, so it is no measure of sight")
    return mean | {"ratio": mean["candidate"] / mean["reference"]}


def _ask_in_the_dark(policy: Any, observation: Observation) -> NDArray[np.float64]:
    if not isinstance(observation, Observation):
        raise EvaluationError("image_sensitivity needs observations with images; this family's samples are tensors")
    images = tuple(None if image is None else Image.new(image.mode, image.size) for image in observation.images)
    dark = replace(observation, images=images)
    if chooses_tokens(policy):
        answer: Predictions = ask(policy, dark)
        return answer.actions
    family = family_of_model(policy)
    assert family.act is not None  # ask() has seen to it
    inputs, blackened = family.inputs(policy, observation), family.inputs(policy, dark)
    pictures = {name: tensor for name, tensor in blackened.items() if tensor.ndim >= _OF_IMAGES}
    action: NDArray[np.float64] = family.act(policy, inputs | pictures).double().cpu().numpy()[None]
    return action
