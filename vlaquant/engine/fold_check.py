"""Whether a stage still computes what it did before scales were folded into it.

Two questions. *Does the place hold?* Every fold is tried with scales of 1/2 and 2, drawn at random. They change
exponents only, so that a fold that holds leaves every output as it was, bit for bit, in any dtype, and one that does
not changes much, however gentle the scales are that a transform would choose. (Where 1 is added to a weight, in Gemma's
and in adaptive norms, the new weight has to be rounded, and the bound is that for rounding.) *Does it hold with the
scales that were chosen?* These round weights anew, and could take float16 out of its range.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats
from vlaquant.families import FoldGroup
from vlaquant.passes.fold import only_exponents, put_linear_, try_fold_
from vlaquant.passes.layer import Work

_HALF = (torch.float16, torch.bfloat16)
#: Relative change of an output that needs no second look, for folds that round, by the coarsest dtype of the unit's
#: parameters. In 16 bits a fold rounds weights, inputs and outputs anew, each at random by at most half a unit in the
#: last place, eps/2, and on average by less than a third of one; the errors of several folds add up like independent
#: ones. 2·eps is above their sum for a block's handful of folds unless the terms of an output cancel.
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5} | {dtype: 2 * torch.finfo(dtype).eps for dtype in _HALF}
#: The same for folds that do not round: nothing but numbers that leave the range of the dtype.
_EXACT = {torch.float64: 1e-5, torch.float32: 1e-5} | dict.fromkeys(_HALF, 1e-3)
#: Above ``_ROUNDING``, what counts is how much rounding alone moves the same output in this model: all parameters of
#: the folds moved at random by up to half a unit in the last place, once. A fold may change it by so many times that:
#: it rounds the activations too, and one draw is not all draws.
_MARGIN = 4.0


class FoldCheck:
    """Compares what a stage computes with what it computed when this was made.

    Args:
        unit: the stage's.
        look: what it computes for one sample, as :meth:`vlaquant.calibrate.running.StageRunner.outputs` gives it.
    """

    def __init__(self, unit: nn.Module, look: Callable[[], dict[str, Tensor]]) -> None:
        self._look = look
        self._before = look()
        dtypes = {parameter.dtype for parameter in unit.parameters()}
        self._rounding, self._exact = (
            max(bound for dtype, bound in bounds.items() if dtype in dtypes) for bounds in (_ROUNDING, _EXACT)
        )

    def wrong_places(self, model: nn.Module, folds: Sequence[FoldGroup]) -> list[str | None]:
        """For each fold why it cannot be right: what it changes. The model is left as it is, bit for bit."""
        exact = [fold for fold in folds if only_exponents(model, fold)]
        together = self._changes_if_tried(model, exact) if exact else {}
        suspects = folds if self._worst(together, self._exact) else [fold for fold in folds if fold not in exact]
        wrong: dict[FoldGroup, str | None] = {}
        for fold in suspects:
            changes = self._changes_if_tried(model, [fold])
            objection = self._worst(changes, self._exact if fold in exact else self._rounding)
            if objection is not None and fold not in exact:
                objection = self._worst(changes, self._rounding, self.noise(Original(model, [fold], {}).modules))
            wrong[fold] = objection
        return [wrong.get(fold) for fold in folds]

    def objection(self, sources: Collection[str], noise: Mapping[str, float] | None = None) -> str | None:
        """Which output differs most, beyond rounding, from what it was, in words; None if none does.

        Args:
            sources: of the folds; their own output is meant to change.
            noise: how much rounding alone moves each output.
        """
        return self._worst(self._changes(sources), self._rounding, noise)

    def noise(self, modules: Iterable[nn.Module]) -> dict[str, float]:
        """How much each output moves if the parameters of ``modules`` are rounded a little differently.

        The model is as it was when this was made, and is again afterwards.
        """
        parameters = list({id(each): each for module in modules for each in module.parameters()}.values())
        originals = [parameter.detach().clone() for parameter in parameters]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in parameters:
                half = torch.finfo(parameter.dtype).eps / 2
                step = torch.empty(parameter.shape).uniform_(-half, half, generator=generator).to(parameter.device)
                parameter.copy_(parameter * (1.0 + step.to(torch.float64)))
            moved = self._changes(())
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)
        return moved

    def _changes_if_tried(self, model: nn.Module, folds: Sequence[FoldGroup]) -> dict[str, float]:
        original = Original(model, folds, {})
        for fold in folds:
            try_fold_(model, fold)
        changes = self._changes([fold.source for fold in folds])
        original.put_back_()
        return changes

    def _changes(self, sources: Collection[str]) -> dict[str, float]:
        after = self._look()
        return {
            name: relative_change(before, after.get(name))
            for name, before in self._before.items()
            if name not in sources
        }

    def _worst(
        self, changes: Mapping[str, float], bound: float, noise: Mapping[str, float] | None = None
    ) -> str | None:
        limits = {name: max(bound, _MARGIN * (noise or {}).get(name, 0.0)) for name in changes}
        beyond = [name for name, change in changes.items() if not change <= limits[name]]
        if not beyond:
            return None
        worst = max(beyond, key=lambda name: changes[name] / limits[name])
        return f"changed the output of {worst} by {changes[worst]:.2g} of its size; rounding: {limits[worst]:.2g}"


def relative_change(before: Tensor, after: Tensor | None) -> float:
    """‖after − before‖ / ‖before‖ over what was finite before; infinite for another shape, and where NaN came up."""
    if after is None or before.shape != after.shape:
        return torch.inf
    finite = before.isfinite()
    before, after = before[finite].to(torch.float64), after[finite].to(torch.float64)
    difference, size = float((after - before).norm()), float(before.norm())
    if difference == 0.0:
        return 0.0
    change = difference / size if size else torch.inf
    return change if change == change else torch.inf


class Original:
    """What folds are about to change, to put it back bit for bit.

    Args:
        model: with the weights as they are.
        groups: the folds.
        works: working weights of the layers that are quantized.
        fresh: these are still the model's own weights, and so are not kept twice.

    Attributes:
        modules: sources and targets.
    """

    def __init__(
        self, model: nn.Module, groups: Sequence[FoldGroup], works: Mapping[str, Work], *, fresh: bool = True
    ) -> None:
        self._linears: list[tuple[nn.Linear, Tensor, Tensor | None]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._works: list[tuple[Work, nn.Linear, Tensor | None, Tensor | None, ActStats | None]] = []
        self.modules: list[nn.Module] = []
        for name in {name: None for group in groups for name in (group.source, *group.targets)}:
            module = model.get_submodule(name)
            self.modules.append(module)
            if not isinstance(module, nn.Linear):
                self._keep_values(module.parameters())
                continue
            # Folds give a Linear other parameters and do not change those it has
            self._linears.append((module, module.weight, module.bias))
            if name in works:
                work = works[name]
                self._works.append((work, module, None if fresh else work.weight, work.bias, work.stats))
        self._keep_values(model.get_parameter(group.gamma) for group in groups if group.gamma is not None)

    def _keep_values(self, parameters: Iterable[Tensor]) -> None:
        self._tensors += [(parameter, parameter.detach().clone()) for parameter in parameters]

    @torch.no_grad()
    def put_back_(self) -> None:
        """Everything is as it was."""
        for tensor, values in self._tensors:
            tensor.copy_(values)
        for linear, weight, bias in self._linears:
            for leaf, parameter in (("weight", weight), ("bias", bias)):
                setattr(linear, leaf, parameter)
        for work, linear, kept, bias, stats in self._works:
            work.weight = linear.weight.detach().to(work.weight.dtype) if kept is None else kept
            work.bias, work.stats = bias, stats


def show_(model: nn.Module, group: FoldGroup, works: Mapping[str, Work]) -> None:
    """Let the model compute with the working weights of a fold's Linears."""
    for name in (group.source, *group.targets):
        if name in works:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            put_linear_(linear, works[name].weight, works[name].bias)
