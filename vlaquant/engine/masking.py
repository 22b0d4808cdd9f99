"""Masks of all samples: what of them is padding, or the image of a missing camera, and must not be calibrated with."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vlaquant.calibrate.running import blamed_on
from vlaquant.engine.processes import Processes
from vlaquant.errors import CalibrationError
from vlaquant.families import Family
from vlaquant.families.base import nothing_masked

#: Index of a sample -> part of the model, or a single layer -> mask, as in ``Family.token_masks``.
Masks = Mapping[int, Mapping[str, Tensor]]


def sample_masks(model: nn.Module, family: Family, samples: Sequence[Any], processes: Processes) -> Masks:
    """Masks of the samples that this process takes; empty for families that mask nothing.

    Raises:
        CalibrationError: the mask of a part leaves out everything in all samples of all processes.
    """
    if family.token_masks is nothing_masked:
        return {}
    masks: dict[int, dict[str, Tensor]] = {}
    for position in processes.positions(len(samples)):
        with blamed_on(position):
            inputs = family.inputs(model, samples[position])
            masks[position] = {part: mask.cpu() for part, mask in family.token_masks(model, inputs).items()}
    known = {part for part, _ in family.parts} | {name for name, _ in model.named_modules()}
    _require_sight(family, masks, processes, len(samples), known)
    return masks


def layer_masks(family: Family, masks: Mapping[str, Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """The mask of each layer that has one, of its own or as its part."""
    owners = {name: name if name in masks else family.part_of(name) for name in layers}
    return {name: masks[owner] for name, owner in owners.items() if owner in masks}


def _require_sight(family: Family, masks: Masks, processes: Processes, samples: int, known: set[str]) -> None:
    seen = {
        part: any(part not in masks[position] or bool(masks[position][part].any()) for position in masks)
        for part in dict.fromkeys(part for mask in masks.values() for part in mask)
    }
    unknown = sorted(seen.keys() - known)
    if unknown:
        raise CalibrationError(
            f"family {family.name} has masks for {', '.join(unknown)}, which is no part of it, and no layer"
        )
    everyone = processes.gather(seen)
    for part in dict.fromkeys(part for one in everyone for part in one):
        # A process in whose samples the part has no mask saw all of it
        if not any(one.get(part, True) for one in everyone):
            raise CalibrationError(
                f"{part}: the masks leave out everything in all {samples} samples (every camera is missing, or there "
                "is nothing but padding), so the policy would be calibrated blind; give samples with images, and name "
                "the data's cameras in the order of the policy's ('cameras:' in the recipe)"
            )
