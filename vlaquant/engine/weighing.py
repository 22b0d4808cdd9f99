"""Token weights of all samples: what each token counts for in Hessians and in the losses of searches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.running import blamed_on, seeded
from vlaquant.calibrate.token_weights import gradient_weights
from vlaquant.engine.masking import layer_masks
from vlaquant.engine.opening import Opened, Run
from vlaquant.engine.prediction import resident_memory
from vlaquant.engine.processes import Processes
from vlaquant.errors import CalibrationError, PlanError
from vlaquant.families import Family
from vlaquant.families.objectives import objective
from vlaquant.plan import Plan
from vlaquant.recipe import Recipe, TypeWeights

#: Index of a sample -> layer -> weights of each of its calls.
Weights = Mapping[int, Mapping[str, Sequence[Tensor]]]

#: Memory of a model and of a backward pass through it, as a multiple of its weights.
_HEADROOM = 1.2


def token_weights(
    opened: Opened,
    recipe: Recipe,
    plan: Plan,
    samples: Sequence[Any],
    run: Run | None,
    shared: Sequence[Sequence[str]],
    *,
    limit: int,
    device: torch.device,
    processes: Processes,
) -> Weights:
    """Weights of the samples that this process takes; empty if the recipe asks for none.

    Args:
        opened: the model; one whose weights come on demand is loaded once more, as a whole, for gradients.
        recipe: what to weigh by.
        plan: says which layers will be observed.
        samples: all of them.
        run: a function that takes samples through the model in the family's place.
        shared: sets of layers that read the same tensors.
        limit: bytes that this process may hold.
        device: where the model runs.
        processes: that share the samples.

    Raises:
        CalibrationError: the family does not know its token types, nothing to take gradients of, or runs no samples.
        PlanError: the model as a whole does not fit into the memory.
    """
    section, family = recipe.token_weights, opened.family
    if section is None:
        return {}
    if run is not None:
        raise CalibrationError(
            "token_weights needs a family that runs its own samples, and here a function `run` was given; remove one "
            "of the two"
        )
    layers = [name for name, layer in plan.quantized.items() if not layer.dead]
    positions = processes.positions(len(samples))
    if isinstance(section, TypeWeights):
        table = torch.tensor([section.image, section.text, section.state, section.action])
        found = {at: _by_type(opened.model, family, samples, at, layers, table) for at in positions}
        if not any(processes.gather(any(found.values()))):
            raise CalibrationError(
                f"family {family.name} reads no tokens of different types, so token_weights of kind types would "
                "change nothing; remove them, or use kind gradient"
            )
        return found
    if family.decide is None:
        raise CalibrationError(
            f"family {family.name} has no objective to take gradients of; use token_weights of kind types"
        )
    model = _whole(opened, limit, device)
    return {at: _by_gradient(model, family, samples, at, layers, shared, section.power) for at in positions}


def _by_type(
    model: nn.Module, family: Family, samples: Sequence[Any], position: int, layers: Sequence[str], table: Tensor
) -> dict[str, tuple[Tensor]]:
    with blamed_on(position):
        types = family.token_types(model, family.inputs(model, samples[position]))
    weights = {part: table[kinds.cpu()] for part, kinds in types.items()}
    return {name: (each,) for name, each in layer_masks(family, weights, layers).items()}


def _by_gradient(
    model: nn.Module,
    family: Family,
    samples: Sequence[Any],
    position: int,
    layers: Sequence[str],
    shared: Sequence[Sequence[str]],
    power: float,
) -> dict[str, list[Tensor]]:
    decide = family.decide
    assert decide is not None
    with seeded(position), blamed_on(position):
        inputs = family.inputs(model, samples[position])
        found = gradient_weights(model, layers, lambda: objective(decide(model, inputs)), shared)
    return {name: [call.pow(power) for call in calls] for name, calls in found.items()}


def _whole(opened: Opened, limit: int, device: torch.device) -> nn.Module:
    """The model with all of its weights."""
    if opened.files is None:
        return opened.model
    assert opened.directory is not None
    needed = int(sum(t.nbytes for t in opened.model.state_dict(keep_vars=True).values()) * _HEADROOM)
    if resident_memory() + needed > limit:
        raise PlanError(
            f"token_weights of kind gradient needs the whole float model at once, {needed / 2**30:.1f} GiB, and "
            f"{max(limit - resident_memory(), 0) / 2**30:.1f} GiB are left; use kind types, or more memory"
        )
    return opened.family.load(opened.directory).to(device)
