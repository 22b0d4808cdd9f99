"""Codes of every layer in every candidate, from statistics that are collected once."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from vlaquant.calibrate import ActStats, observe
from vlaquant.calibrate.statistics import final_stats
from vlaquant.engine.masking import layer_masks
from vlaquant.engine.prediction import available_memory
from vlaquant.engine.run import Probed
from vlaquant.engine.stage import working_copies
from vlaquant.families import Family
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes.layer import quantize_layers
from vlaquant.plan import Plan
from vlaquant.recipe import Gptaq, Gptq, Quantizer, Recipe, Rtn
from vlaquant.sensitivity.groups import Group

#: Candidate -> layer -> codes.
Codes = Mapping[str, Mapping[str, QuantizedWeight]]

#: Share of the free memory that Hessians may take; more layers than fit are observed in another pass.
_SHARE = 0.25
_PLENTY = 1 << 33


def round_groups(
    model: nn.Module, family: Family, data: Probed, groups: Sequence[Group], plans: Mapping[str, Plan], recipe: Recipe
) -> Codes:
    """What the recipe's quantizer makes of each layer in each candidate, all other layers being float.

    Transforms are left out. All of the calibration data is used, in one pass if the Hessians fit the memory.
    """
    codes: dict[str, dict[str, QuantizedWeight]] = {candidate: {} for candidate in plans}
    quantizer = _alone(recipe.layer_quantizer)
    blind = isinstance(quantizer, Rtn) and quantizer.clip != "awq" and not quantizer.refit
    for batch in _batches(groups):
        stats = {} if blind else _observe(model, family, data, batch, recipe.seed)
        for candidate, plan in plans.items():
            works = working_copies(model, {name: plan.quantized[name] for name in batch}, stats, wide=True)
            solved = quantize_layers(works, quantizer)
            codes[candidate] |= {name: weight for name, (weight, _) in solved.items()}
    return codes


def _alone(quantizer: Quantizer) -> Quantizer:
    """The quantizer for a layer that is the only rounded one: nothing that it reads has changed."""
    if isinstance(quantizer, Gptaq):
        return Gptq(**quantizer.model_dump(exclude={"kind", "alpha"}))
    return quantizer


def _batches(groups: Sequence[Group]) -> list[list[str]]:
    room = _SHARE * (available_memory() or _PLENTY)
    batches: list[list[str]] = [[]]
    filled = 0
    for group in groups:
        size = 12 * group.shapes[0][1] ** 2  # the sums in float64, half of them, and their mean in float32
        if batches[-1] and filled + size > room:
            batches.append([])
            filled = 0
        batches[-1] += group.names
        filled += size
    return batches


def _observe(model: nn.Module, family: Family, data: Probed, names: Sequence[str], seed: int) -> dict[str, ActStats]:
    with torch.inference_mode(), observe(model, names, hessian_for=names, seed=seed) as observation:
        for position, sample in enumerate(data.samples):
            masks = layer_masks(family, data.masks.get(position, {}), names)
            observation.begin_sample(masks, weights=data.weights.get(position), index=position)
            data.run(model, sample)
    observation.check(data.min_tokens)
    return final_stats(observation.running())
