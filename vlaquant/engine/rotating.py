"""The model of a run in its new basis, before anything else is done to it.

Rotated tensors are computed whenever they are read, from the source and the recipe's seed. So all that follows
(stages, resumed runs, writing, verifying) works as on a checkpoint that was rotated beforehand.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.units import Stage
from vlaquant.checkpoint import TensorFiles, read_config
from vlaquant.engine.fold_check import relative_change
from vlaquant.engine.opening import Opened
from vlaquant.engine.stage import put_tensor_
from vlaquant.engine.weights import WeightsOnDemand
from vlaquant.errors import PlanError
from vlaquant.families import Family, Residual, find_folds, find_residual
from vlaquant.passes.rotation import Turned, turned_tensors
from vlaquant.plan import Plan, make_plan
from vlaquant.recipe import Recipe

#: Relative change of the output that rounding may make, by the coarsest dtype of the parameters. Weights and
#: activations are rounded anew in the other basis. SmolLM2 in bfloat16 changes by 0.03; whatever is turned wrongly, or
#: not at all, in every block changes the output by about its own size.
_ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


def rotate_(opened: Opened, recipe: Recipe, stages: Sequence[Stage], device: torch.device) -> Opened:
    """Rotate a model, or what will be read of it, and make sure that it still computes the same.

    Args:
        opened: a model in memory is changed.
        recipe: may ask for a rotation.
        stages: all units.
        device: where the model runs.

    Raises:
        PlanError: the model cannot be rotated.
    """
    if recipe.rotation is None:
        return opened
    model, family = opened.model, opened.family
    residual = find_residual(model, family.name, family.stream, find_folds(model, family.folds))
    turned = turned_tensors(model, residual, recipe.rotation, recipe.seed)
    before = _example_output(opened, stages, device)
    head = residual.head if recipe.rotation.residual and residual.tied else None
    if opened.files is not None:
        _derive_(opened.files, turned, residual)
    if head is not None:
        untie_(model, head)
    if opened.files is None:
        _replace_(model, turned)
    change = relative_change(before, _example_output(opened, stages, device))
    bound = max(_ROUNDING[parameter.dtype] for parameter in model.parameters() if parameter.dtype in _ROUNDING)
    if not change <= bound:
        raise PlanError(
            f"rotation: changed the output of {type(model).__name__} by {change:.2g} of its size; rounding: {bound}. "
            "Its names do not tell how it reads and writes its residual stream; remove the transform"
        )
    return replace(opened, note=f"{opened.note}; rotated, which changed an output by {change:.1e}", untied=head)


def plan_for(model: nn.Module, family: Family, recipe: Recipe, *, untied: str | None = None) -> Plan:
    """:func:`vlaquant.plan.make_plan`, for the model as a rotation leaves it; the model is left as it is.

    Args:
        model: not rotated yet, or rotated by :func:`rotate_`.
        family: of the model.
        recipe: may ask for a rotation.
        untied: the head that :func:`rotate_` gave a weight of its own.

    Raises:
        PlanError: as for ``make_plan``; a model that cannot be rotated.
    """
    if recipe.rotation is not None and untied is None:
        residual = find_residual(model, family.name, family.stream, find_folds(model, family.folds))
        turned_tensors(model, residual, recipe.rotation, recipe.seed)
        if recipe.rotation.residual and residual.tied:
            model, untied = empty_copy(model), residual.head
            untie_(model, untied)
    plan = make_plan(model, family, recipe)
    reason = "a weight of its own: rotation folds the last norm into it, and not into the embedding"
    layers = [
        replace(layer, bytes_before=0, reason=f"{layer.reason}; {reason}") if layer.name == untied else layer
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def untie_(model: nn.Module, head: str) -> None:
    """Give the head a parameter of its own, with the values that it shared; the configuration says so."""
    weight = model.get_parameter(f"{head}.weight")
    put_tensor_(model, f"{head}.weight", nn.Parameter(weight.detach(), requires_grad=False))
    config: Any = model.config
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False


def untied_config(directory: Path) -> dict[str, Any]:
    """The fields of a directory's ``config.json`` that change with :func:`untie_`."""
    text = read_config(directory).get("text_config")
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    return changed | ({"text_config": text | changed} if isinstance(text, dict) else {})


def empty_copy(model: nn.Module) -> nn.Module:
    """The same modules with parameters on the meta device; tied ones are tied in the copy."""
    empty = {id(each): nn.Parameter(each.detach().to("meta"), requires_grad=False) for each in model.parameters()}
    return copy.deepcopy(model, dict(empty))


def _example_output(opened: Opened, stages: Sequence[Stage], device: torch.device) -> Tensor:
    """What the model computes for the family's made-up sample; weights on demand go into a copy, one unit at a time."""
    model, weights = opened.model, None
    if opened.files is not None:
        model = empty_copy(model)
        weights = WeightsOnDemand(model, stages, opened.files, budget=0, device=device)
    with torch.inference_mode():
        output = opened.family.run(model, opened.family.example(model))
    if weights is not None:
        weights.close()
    return output


def _derive_(files: TensorFiles, turned: Mapping[str, Turned], residual: Residual) -> None:
    """Let the files give rotated tensors; of a tied embedding and head they may hold either name."""
    names = {name: name for one in turned.values() for name in one.sources}
    embedding = f"{residual.embedding}.weight"
    if residual.tied and embedding in names and embedding not in files:
        names[embedding] = f"{residual.head}.weight"
    files.derive_({name: ([names[source] for source in one.sources], one.make) for name, one in turned.items()})


@torch.no_grad()
def _replace_(model: nn.Module, turned: Mapping[str, Turned]) -> None:
    """Give a model in memory rotated parameters: those made of others first, and gains, which many need, last."""

    def turn(item: tuple[str, Turned]) -> int:
        name, one = item
        return (one.source == name) + (one.constant is not None)

    for name, one in sorted(turned.items(), key=turn):
        sources = [model.get_parameter(source) for source in one.sources]
        new = one.make(*sources).to(sources[0].device)
        put_tensor_(model, name, nn.Parameter(new, requires_grad=False))
