"""Every layer of a model: working copies, transforms over all folds, codes, and the swap."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate.gathering import Gathered
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.families import Family, FoldGroup, Inputs, find_folds
from vlaquant.linear import from_quantized, replace_module_
from vlaquant.passes.layer import LayerRecord, quantize_layer, static_input
from vlaquant.passes.transform import TransformRecord, Work, transform_group_
from vlaquant.recipe import Quantizer, Recipe

Progress = Callable[[Sequence[Any]], Iterable[Any]]

#: Largest relative change of the model's output that exact folds may cause, by rounding in the parameters' dtype.
_FOLD_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_finite(model: nn.Module) -> None:
    """Refuse a loaded model with NaN or infinite weights.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"{name} holds values that are NaN or infinite")


def begin(model: nn.Module, gathered: Gathered) -> dict[str, Work]:
    """float32 working copies of every weight that the plan quantizes, by name."""
    works = {}
    for name, layer in gathered.plan.quantized.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert layer.scheme is not None
        works[name] = Work(
            weight=linear.weight.detach().to(torch.float32),
            bias=None if linear.bias is None else linear.bias.detach().to(torch.float32),
            scheme=layer.scheme,
            stats=None if layer.dead else gathered.stats.get(name),
            scale_dtype=linear.weight.dtype,
        )
    return works


def transform_(
    model: nn.Module,
    family: Family,
    works: dict[str, Work],
    recipe: Recipe,
    inputs: Inputs | None,
    *,
    shared: tuple[tuple[str, ...], ...],
    progress: Progress,
) -> list[TransformRecord]:
    """Apply the recipe's transforms, in order, to every fold whose layers all have data.

    Raises:
        CalibrationError: the model's output changed, so the family's table of folds is wrong for this model.
    """
    groups = [group for group in find_folds(model, family.folds) if _eligible(model, group, works, shared)]
    if not groups or not recipe.transforms:
        return []
    before = _output(model, family, inputs)
    records = [
        transform_group_(model, group, works, transform)
        for transform in recipe.transforms
        for group in progress(groups)
    ]
    _check_same_function(model, family, works, inputs, before)
    return records


def _eligible(model: nn.Module, group: FoldGroup, works: dict[str, Work], shared: tuple[tuple[str, ...], ...]) -> bool:
    """Whether all targets have data, nothing else reads their input, and the source can take the inverse scale."""
    readers = next((set(names) for names in shared if group.targets[0] in names), {group.targets[0]})
    if readers != set(group.targets):
        return False
    if any(name not in works or works[name].stats is None for name in group.targets):
        return False
    return group.source in works or not isinstance(model.get_submodule(group.source), nn.Linear)


@torch.inference_mode()
def _output(model: nn.Module, family: Family, inputs: Inputs | None) -> Tensor | None:
    return None if inputs is None else family.run(model, inputs).to(torch.float32)


def _check_same_function(
    model: nn.Module, family: Family, works: dict[str, Work], inputs: Inputs | None, before: Tensor | None
) -> None:
    """Put the working weights into the model and run it again: scaling must not have changed what it computes."""
    for name, work in works.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        linear.weight = nn.Parameter(work.weight.to(work.scale_dtype), requires_grad=False)
        if work.bias is not None:
            linear.bias = nn.Parameter(work.bias.to(work.scale_dtype), requires_grad=False)
    after = _output(model, family, inputs)
    if before is None or after is None:
        return
    change = float((after - before).norm() / before.norm())
    tolerance = max(_FOLD_TOLERANCE[work.scale_dtype] for work in works.values())
    if not change <= tolerance:
        raise CalibrationError(
            f"scaling norms and Linears changed the model's output by {change:.2%} (rounding: {tolerance:.0%}), "
            f"so the folds of family {family.name} do not fit this model. Run without transforms, and please report it"
        )


def quantize_layers_(
    model: nn.Module, works: dict[str, Work], quantizer: Quantizer, *, progress: Progress
) -> list[LayerRecord]:
    """Turn every working weight into a packed layer and put it into the model."""
    records = []
    for name in progress(list(works)):
        work = works.pop(name)
        codes, record = quantize_layer(
            name, work.weight, work.scheme, work.stats, quantizer, scale_dtype=work.scale_dtype
        )
        input_scale = input_zero = None
        activation = work.scheme.activation
        if activation is not None and not activation.dynamic:
            assert work.stats is not None
            input_scale, input_zero = static_input(work.stats, activation, work.scale_dtype)
        layer = from_quantized(
            codes, work.scheme, work.bias, dtype=work.scale_dtype, input_scale=input_scale, input_zero=input_zero
        )
        replace_module_(model, name, layer)
        records.append(record)
    return records
