"""Where in the network the error arises: hidden states at the ends of its parts, and velocities of denoising steps."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlaquant.calibrate.masks import counted_rows
from vlaquant.errors import EvaluationError
from vlaquant.evaluate.figures import DECIBELS, OBSERVATIONS, SHARE, Figure, Groups, counted
from vlaquant.evaluate.statistics import Floats, bootstrap, divided
from vlaquant.families import Family, Inputs, family_of_model

_OTHER = "other"
Progress = Callable[[Sequence[Any]], Sequence[Any]]


@torch.inference_mode()
def look_inside(
    candidate: nn.Module, reference: nn.Module, samples: Sequence[Any], episodes: Groups, progress: Progress
) -> tuple[dict[str, Figure], tuple[Figure, ...] | None]:
    """Run both policies on the same inputs, with the same noise, and compare what goes on in them.

    Args:
        candidate: the quantized policy.
        reference: the float one, of the same class.
        samples: observations, or what else the family makes inputs of.
        episodes: of the samples.
        progress: wraps the samples.

    Returns:
        Part -> :func:`sqnr_db` at its end, and the :func:`relative_error` of the velocity in each denoising step; None
        for policies that do not denoise.
    """
    family = family_of_model(reference)
    inputs = family.inputs(reference, samples[0])
    ends, heads = ends_of_parts(reference, family, inputs), _velocity_modules(reference, family)
    powers: dict[str, list[tuple[float, float]]] = {part: [] for part in ends}
    speeds: list[list[tuple[float, float]]] = []
    for sample in progress(samples):
        found = []
        for model in (reference, candidate):
            inputs = family.inputs(model, sample)
            with watched(model, [*ends.values(), *heads]) as outputs:
                action = _act(family, model, inputs)
            found.append((outputs, action))
        masks = family.token_masks(reference, inputs)
        for part, name in ends.items():
            # Only the first call: what later ones read depends on what the models chose before
            both = [_counted(name, outputs[name][0], masks.get(part)) for outputs, _ in found]
            powers[part].append(_power(*both))
        for name in heads:
            steps = [_velocities(outputs[name], action) for outputs, action in found]
            speeds.append([_power(*pair) for pair in zip(*steps, strict=True)])
    # [samples, steps, 2]
    by_step = np.asarray(speeds, dtype=np.float64)
    velocity = tuple(relative_error(by_step[:, step], episodes) for step in range(by_step.shape[1])) if heads else None
    return {part: sqnr_db(np.asarray(values), episodes) for part, values in powers.items()}, velocity


def ends_of_parts(model: nn.Module, family: Family, inputs: Inputs) -> dict[str, str]:
    """Part -> the module whose output is what the part hands over: the last of it to return in an action.

    Modules that hold layers of one part only belong to it. Seen by watching one action; parts are in the order in which
    the action runs through them.
    """
    owners = _owners(model, family)
    returned: list[str] = []

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if _first_tensor(output) is not None:
                returned.append(name)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in owners]
    try:
        _act(family, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    last = {owners[name]: place for place, name in enumerate(returned)}
    return {part: returned[place] for part, place in sorted(last.items(), key=lambda item: item[1])}


def _owners(model: nn.Module, family: Family) -> dict[str, str]:
    """Name -> part, of modules all of whose leaves are of one part; without leaves that no action depends on."""
    parts: dict[str, set[str]] = {}
    dead = family.dead(model)
    for name, module in model.named_modules():
        if name and name not in dead and not any(module.children()):
            part, pieces = family.part_of(name), name.split(".")
            for end in range(1, len(pieces) + 1):
                parts.setdefault(".".join(pieces[:end]), set()).add(part)
    return {name: next(iter(found)) for name, found in parts.items() if len(found) == 1 and _OTHER not in found}


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Name -> the first float tensor of every output of that module, as long as the context lasts."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = _first_tensor(output)
            if tensor is not None:
                outputs[name].append(tensor.detach().clone())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in outputs]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _act(family: Family, model: nn.Module, inputs: Inputs) -> Tensor:
    if family.act is None:
        raise EvaluationError(f"{type(model).__name__} takes no actions, so there is nothing to follow")
    return family.act(model, inputs)


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    inner = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return next((found for found in map(_first_tensor, inner) if found is not None), None)


def _counted(name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that are no padding, where the mask is about these rows."""
    fits = mask is not None and mask.shape == x.shape[: mask.ndim]
    return counted_rows(name, x, mask if fits else None)


def _velocity_modules(model: nn.Module, family: Family) -> list[str]:
    if family.velocity is None:
        return []
    return [name for name, _ in model.named_modules() if re.fullmatch(family.velocity, name)]


def _velocities(outputs: Sequence[Tensor], action: Tensor) -> list[Tensor]:
    """Of each denoising step, the velocity of the numbers that are the action [chunk, dimension]."""
    chunk, dimension = action.shape
    return [one[0, -chunk:, :dimension] for one in outputs]


def _power(reference: Tensor, candidate: Tensor) -> tuple[float, float]:
    """Σ x² of the reference, and Σ of the squared differences."""
    signal, other = reference.double(), candidate.double()
    return float(signal.square().sum()), float((other - signal).square().sum())


def sqnr_db(powers: NDArray[np.float64], episodes: Groups) -> Figure:
    """Signal to quantization noise: 10 log₁₀(Σ h² / Σ (ĥ − h)²) in dB, infinite for equal hidden states.

    Args:
        powers: of each sample, Σ h² of the float model and Σ (ĥ − h)² [n, 2].
        episodes: of the samples.

    Source: Widrow and Kollár 2008, Quantization Noise, chapter 1.
    """

    def figure(sums: Floats) -> Floats:
        # No signal and no noise is no error either
        ratio = np.where(sums[:, 1] == 0, np.inf, divided(sums[:, 0], sums[:, 1]))
        with np.errstate(divide="ignore"):
            return np.asarray(10 * np.log10(ratio))

    return _of_powers(powers, episodes, figure, DECIBELS)


def relative_error(powers: NDArray[np.float64], episodes: Groups) -> Figure:
    """‖v̂ − v‖ / ‖v‖ of one denoising step, over all samples; both policies started from the same noise.

    From the second step on, each policy is where its own steps led it, as on the robot: the error holds what has
    gathered until then.

    Args:
        powers: of each sample, Σ v² of the float policy and Σ (v̂ − v)² [n, 2].
        episodes: of the samples.

    Source: the velocity field of flow matching, Lipman et al. 2023, arXiv:2210.02747, eq. 1.
    """

    def figure(sums: Floats) -> Floats:
        return np.asarray(np.where(sums[:, 1] == 0, 0.0, np.sqrt(divided(sums[:, 1], sums[:, 0]))))

    return _of_powers(powers, episodes, figure, SHARE)


def _of_powers(powers: Floats, episodes: Groups, figure: Callable[[Floats], Floats], unit: str) -> Figure:
    sums = episodes.sums(powers[:, 0], powers[:, 1])
    value = float(figure(sums.sum(axis=0, keepdims=True))[0])
    return counted(value, unit, len(powers), OBSERVATIONS, bootstrap(sums, figure))
