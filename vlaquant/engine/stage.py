"""One stage: working copies, transforms, codes, and what stands in for the layers while later stages are calibrated."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats
from vlaquant.calibrate.units import Stage
from vlaquant.errors import CalibrationError
from vlaquant.families import Family, FoldGroup
from vlaquant.linear import QuantLinear, W8A8Linear, from_quantized, replace_module_
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes.layer import LayerRecord, Work, static_input
from vlaquant.passes.transform import TransformRecord, transform_group_
from vlaquant.plan import LayerPlan
from vlaquant.recipe import Recipe

#: Largest relative change of a unit's output that exact folds may cause, by rounding in the parameters' dtype.
_FOLD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True, slots=True, eq=False)
class StageResult:
    """A finished stage.

    Attributes:
        packed: quantized layers by name.
        layers: one record for each of them.
        transforms: one record for every fold that was tried.
    """

    packed: dict[str, QuantLinear]
    layers: tuple[LayerRecord, ...]
    transforms: tuple[TransformRecord, ...]


def working_copies(
    model: nn.Module, layers: Mapping[str, LayerPlan], stats: Mapping[str, ActStats], *, wide: bool
) -> dict[str, Work]:
    """The weights that a stage quantizes, with the statistics of their inputs; ``wide`` ones are float32 already."""
    works = {}
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert layer.scheme is not None
        works[name] = Work(
            weight=linear.weight.detach().to(torch.float32 if wide else linear.weight.dtype),
            bias=None if linear.bias is None else linear.bias.detach().to(torch.float32),
            scheme=layer.scheme,
            stats=None if layer.dead else stats.get(name),
            scale_dtype=linear.weight.dtype,
        )
    return works


def eligible_folds(
    model: nn.Module, folds: Sequence[FoldGroup], works: Mapping[str, Work], shared: Sequence[tuple[str, ...]]
) -> list[FoldGroup]:
    """Folds whose targets are all of this stage and have data, and whose source nothing else reads."""
    return [fold for fold in folds if _eligible(model, fold, works, shared)]


def _eligible(model: nn.Module, fold: FoldGroup, works: Mapping[str, Work], shared: Sequence[tuple[str, ...]]) -> bool:
    readers = next((set(names) for names in shared if fold.targets[0] in names), {fold.targets[0]})
    if readers != set(fold.targets):
        return False
    if any(name not in works or works[name].stats is None for name in fold.targets):
        return False
    return fold.source in works or not isinstance(model.get_submodule(fold.source), nn.Linear)


def transform_stage_(
    model: nn.Module,
    family: Family,
    folds: Sequence[FoldGroup],
    works: dict[str, Work],
    recipe: Recipe,
    *,
    before: Tensor | None,
    output: Callable[[], Tensor | None],
) -> tuple[TransformRecord, ...]:
    """Apply the recipe's transforms, in order, to the folds of a stage; the working weights are put into the model.

    Args:
        model: holds the float stage.
        family: named in the error.
        folds: eligible ones.
        works: changed.
        recipe: says which transforms.
        before: what the stage gave for a sample, float; None if that is not known.
        output: gives it anew.

    Raises:
        CalibrationError: the stage's output changed, so the family's table of folds is wrong for this model.
    """
    records = tuple(
        transform_group_(model, fold, works, transform) for transform in recipe.transforms for fold in folds
    )
    if not any(record.kept for record in records):
        return records
    for name, work in works.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(work.weight.to(work.scale_dtype), requires_grad=False)
        if work.bias is not None:
            linear.bias = nn.Parameter(work.bias.to(work.scale_dtype), requires_grad=False)
    after = output()
    if before is not None and after is not None:
        _require_same(before, after, family, works)
    return records


def _require_same(before: Tensor, after: Tensor, family: Family, works: Mapping[str, Work]) -> None:
    before, after = before.to(torch.float32), after.to(torch.float32)
    change = float((after - before).norm() / before.norm())
    tolerance = max(_FOLD_TOLERANCE[work.scale_dtype] for work in works.values())
    if not change <= tolerance:
        raise CalibrationError(
            f"scaling norms and Linears of {', '.join(list(works)[:3])} … changed what they compute by {change:.2%} "
            f"(rounding: {tolerance:.0%}), so the folds of family {family.name} do not fit this model. Run without "
            "transforms, and please report it"
        )


def pack(works: Mapping[str, Work], weights: Mapping[str, QuantizedWeight]) -> dict[str, QuantLinear]:
    """Packed layers from codes."""
    packed = {}
    for name, weight in weights.items():
        work = works[name]
        input_scale = input_zero = None
        activation = work.scheme.activation
        if activation is not None and not activation.dynamic:
            assert work.stats is not None
            input_scale, input_zero = static_input(work.stats, activation, work.scale_dtype)
        packed[name] = from_quantized(
            weight, work.scheme, work.bias, dtype=work.scale_dtype, input_scale=input_scale, input_zero=input_zero
        )
    return packed


def stand_in_(model: nn.Module, packed: Mapping[str, QuantLinear]) -> None:
    """Let the model compute as if the layers were packed: plain Linears with the dequantized weights.

    That is the same function without unpacking at every call. Layers that round their input are put in as they are.
    """
    for name, layer in packed.items():
        if isinstance(layer, W8A8Linear):
            replace_module_(model, name, layer)
            continue
        linear = model.get_submodule(name)
        linear.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)


def put_tensor_(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Let the parameter or buffer ``name`` be ``tensor`` itself."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, tensor)


def float_tensors(model: nn.Module, stage: Stage) -> dict[str, Tensor]:
    """The tensors of a unit as they are; norms are copied, as folds change them in place."""
    linears = {f"{name}.{leaf}" for name in stage.linears for leaf in ("weight", "bias")}
    tensors = model.get_submodule(stage.unit).state_dict(prefix=f"{stage.unit}.", keep_vars=True)
    return {name: tensor if name in linears else copy.deepcopy(tensor) for name, tensor in tensors.items()}


def unit_tensors(model: nn.Module, unit: str, packed: Mapping[str, QuantLinear]) -> dict[str, Tensor]:
    """The tensors of a finished unit as they will be written: packed layers, and the rest as it is now."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.get_submodule(unit).state_dict(prefix=f"{unit}.").items():
        owner, _, _ = name.rpartition(".")
        if owner not in packed:
            tensors[name] = tensor
        elif not any(key.startswith(f"{owner}.") for key in tensors):
            tensors.update(packed[owner].state_dict(prefix=f"{owner}."))
    return tensors
