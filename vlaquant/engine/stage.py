"""One stage: working copies, transforms, codes, and what stands in for the layers while later stages are calibrated."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats
from vlaquant.calibrate.units import Stage
from vlaquant.engine.fold_check import FoldCheck, Original, show_
from vlaquant.engine.processes import Processes
from vlaquant.families import FoldGroup
from vlaquant.families.folds import obstacle
from vlaquant.linear import QuantLinear, W8A8Linear, from_quantized, replace_module_
from vlaquant.numerics import QuantizedWeight
from vlaquant.passes.layer import LayerRecord, Work, static_input
from vlaquant.passes.transform import TransformRecord, suits, transform_group_
from vlaquant.plan import LayerPlan
from vlaquant.recipe import Recipe, Transform


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
    model: nn.Module,
    folds: Sequence[FoldGroup],
    works: Mapping[str, Work],
    shared: Sequence[tuple[str, ...]],
    unit: str,
) -> list[FoldGroup]:
    """Folds within ``unit`` of which a quantized layer with data gains, and whose source only the targets read."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return [
        fold
        for fold in folds
        if all(name.startswith(f"{unit}.") for name in (fold.source, *fold.targets))
        and obstacle(model, fold) is None
        and _eligible(fold, works, shared)
        and all(
            uses[id(parameter)] == 1
            for name in (fold.source, *fold.targets)
            for parameter in model.get_submodule(name).parameters()
        )
    ]


def _eligible(fold: FoldGroup, works: Mapping[str, Work], shared: Sequence[tuple[str, ...]]) -> bool:
    quantized = [name for name in fold.targets if name in works]
    if fold.gamma is not None:
        quantized = [name for name in (fold.source,) if name in works]
    else:
        readers = next((set(names) for names in shared if fold.targets[0] in names), {fold.targets[0]})
        if readers != set(fold.targets):
            return False
    return bool(quantized) and all(works[name].stats is not None for name in quantized)


def transform_stage_(
    model: nn.Module,
    folds: Sequence[FoldGroup],
    works: Mapping[str, Work],
    recipe: Recipe,
    *,
    part_of: Callable[[str], str],
    unit: str,
    look: Callable[[], dict[str, Tensor]],
    processes: Processes,
) -> tuple[TransformRecord, ...]:
    """Apply the recipe's transforms, in order, to the folds of a stage; the working weights are put into the model.

    What the stage computes for one sample is compared with before, see :mod:`vlaquant.engine.fold_check`. A fold that
    changes it is undone, bit for bit, and its record says so.

    Args:
        model: holds the float stage.
        folds: eligible ones.
        works: changed.
        recipe: says which transforms.
        part_of: module name -> the part of the model that it belongs to.
        unit: of the stage.
        look: gives what the stage computes; called in the main process only.
        processes: that do the same; the main one decides.
    """
    parts = [part_of(fold.targets[0] if fold.targets else fold.source) for fold in folds]
    pairs = [
        (transform, fold)
        for transform in recipe.scalings
        for fold, part in zip(folds, parts, strict=True)
        if suits(transform, fold, part)
    ]
    if not pairs:
        return ()
    check = FoldCheck(model.get_submodule(unit), look) if processes.main else None
    tried = list(dict.fromkeys(fold for _, fold in pairs))
    found = processes.from_main(check.wrong_places(model, tried) if check else None)
    wrong = {fold: why for fold, why in zip(tried, found, strict=True) if why is not None}
    original = Original(model, tried, works)
    records = [
        _refused(transform, fold, wrong[fold]) if fold in wrong else transform_group_(model, fold, works, transform)
        for transform, fold in pairs
    ]
    changed = [fold for (_, fold), record in zip(pairs, records, strict=True) if record.kept]
    for fold in changed:
        show_(model, fold, works)
    # All together first: nearly always that is enough
    sources = {fold.source for fold in changed}
    if processes.from_main(check.objection(sources) if check and changed else None) is None:
        return tuple(records)
    original.put_back_()
    return _one_by_one(model, pairs, works, wrong, check, processes)


def _refused(transform: Transform, fold: FoldGroup, reason: str) -> TransformRecord:
    return TransformRecord(
        transform.kind, fold.source, fold.targets, None, None, kept=False, strength=0.0, reverted=reason
    )


def _one_by_one(
    model: nn.Module,
    pairs: Sequence[tuple[Transform, FoldGroup]],
    works: Mapping[str, Work],
    wrong: Mapping[FoldGroup, str],
    check: FoldCheck | None,
    processes: Processes,
) -> tuple[TransformRecord, ...]:
    """Apply transforms and undo each that changes what the stage computes, beyond what rounding does in it."""
    noise = check.noise(Original(model, [fold for _, fold in pairs], {}).modules) if check else None
    records, sources = [], set[str]()
    for transform, fold in pairs:
        if fold in wrong:
            records.append(_refused(transform, fold, wrong[fold]))
            continue
        original = Original(model, [fold], works, fresh=False)
        record = transform_group_(model, fold, works, transform)
        show_(model, fold, works)
        found = check.objection({*sources, fold.source}, noise) if check and record.kept else None
        objection = processes.from_main(found)
        if objection is not None:
            original.put_back_()
            record = replace(record, kept=False, reverted=objection)
        elif record.kept:
            sources.add(fold.source)
        records.append(record)
    return tuple(records)


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
