"""Scaling that keeps the function: what is divided out of one module's output is multiplied into its readers.

The rules for each kind of source, and where they come from, are in :mod:`vlaquant.families.folds`. All arithmetic is in
float32, or float64 for float64 parameters, and rounded once to the parameter's dtype.

Letters: m channels that have a scale, k columns of the targets; k is a multiple of m.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlaquant.calibrate.statistics import ActStats
from vlaquant.errors import PlanError
from vlaquant.families import FoldGroup, norm_offset
from vlaquant.families.folds import SCALE, SHIFT
from vlaquant.passes.layer import Work


@torch.no_grad()
def apply_fold_(model: nn.Module, group: FoldGroup, scale: Tensor, works: Mapping[str, Work]) -> None:
    """Divide the output of a fold's source by ``scale`` [m], and multiply the columns of all its targets.

    Layers in ``works`` change there, with the statistics of their input; those that share statistics share the scaled
    ones. Linears that are not, and so stay float, get new parameters, and norms change in place.

    Raises:
        PlanError: shapes that do not fit.
    """
    source = model.get_submodule(group.source)
    if isinstance(source, nn.Linear):
        weight, bias = _read(source, works.get(group.source))
        _require_scale(scale, len(weight) // max(len(group.chunks), 1), group.source)
        _write_(source, works.get(group.source), *divided(weight, bias, scale.to(weight), group.chunks))
    else:
        scale = fold_norm_(source, scale, offset=norm_offset(source))
    scaled: dict[int, ActStats] = {}
    for name in group.targets:
        target, work = model.get_submodule(name), works.get(name)
        assert isinstance(target, nn.Linear)
        weight, bias = _read(target, work)
        columns = spread(scale, weight.shape[1], group.head_dim)
        _write_(target, work, weight * columns.to(weight), bias)
        if work is not None and work.stats is not None:
            if id(work.stats) not in scaled:
                scaled[id(work.stats)] = scaled_stats(work.stats, columns)
            work.stats = scaled[id(work.stats)]


@torch.no_grad()
def fold_layer_scale_(model: nn.Module, group: FoldGroup, works: Mapping[str, Work]) -> None:
    """Multiply the factors γ of a LayerScale into the rows of the Linear before it; γ becomes 1."""
    assert group.gamma is not None
    gamma, source = model.get_parameter(group.gamma), model.get_submodule(group.source)
    assert isinstance(source, nn.Linear)
    weight, bias = _read(source, works.get(group.source))
    wide = gamma.to(weight)
    _write_(source, works.get(group.source), weight * wide.unsqueeze(-1), None if bias is None else bias * wide)
    gamma.fill_(1.0)


def channels_of(model: nn.Module, group: FoldGroup) -> int:
    """How many scales a fold has."""
    source = model.get_submodule(group.source)
    if isinstance(source, nn.Linear):
        return source.out_features // max(len(group.chunks), 1)
    weight = source.weight
    assert isinstance(weight, Tensor)
    return len(weight)


def only_exponents(model: nn.Module, group: FoldGroup) -> bool:
    """Whether powers of 2 can be folded without any rounding: no 1 is added to what is divided."""
    source = model.get_submodule(group.source)
    return not group.chunks if isinstance(source, nn.Linear) else norm_offset(source) == 0.0


@torch.no_grad()
def try_fold_(model: nn.Module, group: FoldGroup) -> None:
    """Fold scales of 1/2 and 2 into the model itself; for a LayerScale, move them from γ into the Linear."""
    channels = channels_of(model, group)
    scale = torch.where(torch.rand(channels, generator=torch.Generator().manual_seed(channels)) < 0.5, 0.5, 2.0)
    source = model.get_submodule(group.source)
    first = next(source.parameters())
    scale = scale.to(first.device)
    if group.gamma is None:
        apply_fold_(model, group, scale, {})
        return
    assert isinstance(source, nn.Linear)
    put_linear_(source, *divided(*_read(source, None), scale))
    gamma = model.get_parameter(group.gamma)
    gamma.copy_(gamma * scale)


def divided(
    weight: Tensor, bias: Tensor | None, scale: Tensor, chunks: Sequence[str] = ()
) -> tuple[Tensor, Tensor | None]:
    """Weight [m, k] and bias [m] of a Linear with its output divided by ``scale`` [m].

    With ``chunks`` the Linear makes scale and shift of an adaptive norm, each [m, k], and it is the norm's output that
    is divided: a row of ``scale`` s becomes that of (1 + s)/scale − 1.
    """
    if not chunks:
        return weight / scale.unsqueeze(-1), None if bias is None else bias / scale
    assert bias is not None
    one = torch.ones_like(scale)
    by = torch.cat([scale if chunk in {SCALE, SHIFT} else one for chunk in chunks])
    # (1 + b)/s − 1 without a difference of numbers near 1
    missing = torch.cat([1.0 - scale if chunk == SCALE else 0.0 * one for chunk in chunks])
    return weight / by.unsqueeze(-1), (bias + missing) / by


def spread(scale: Tensor, columns: int, head_dim: int | None) -> Tensor:
    """[m] -> [k]: the scale of each column; query heads that read one value head have its scales."""
    if len(scale) == columns:
        return scale
    assert head_dim is not None
    return scale.reshape(-1, 1, head_dim).expand(-1, columns // len(scale), -1).reshape(columns)


def gathered(values: Tensor, channels: int, head_dim: int | None) -> Tensor:
    """[..., k] -> [..., k/m, m]: the columns that share a scale below each other; undoes :func:`spread`."""
    columns = values.shape[-1]
    if columns == channels:
        return values.unsqueeze(-2)
    assert head_dim is not None
    heads = values.reshape(*values.shape[:-1], channels // head_dim, columns // channels, head_dim)
    return heads.transpose(-3, -2).reshape(*values.shape[:-1], columns // channels, channels)


@torch.no_grad()
def fold_norm_(norm: nn.Module, scale: Tensor, linears: Iterable[nn.Linear] = (), *, offset: float = 0.0) -> Tensor:
    """Divide the output of a norm by ``scale`` [k], and multiply the columns of the Linears that read it.

    Args:
        norm: has a ``weight`` [k] and maybe a ``bias`` [k], such as ``nn.LayerNorm`` or any RMSNorm.
        scale: positive and finite.
        linears: everything that reads the norm's output.
        offset: what the norm adds to its weight: 1.0 for Gemma's x̂·(1 + w), where w becomes (1 + w)/s − 1.

    Returns:
        The scale that the norm really has, which differs by the rounding of its new weight. Readers have to be scaled
        by this one for the function to stay; ``linears`` were. Float32, or float64 for a float64 norm.

    Raises:
        PlanError: no such weight, or shapes that do not fit.
    """
    linears = list(linears)
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        raise PlanError(f"{type(norm).__name__} has no weight [k] to fold a scale into; remove this fold")
    _require_scale(scale, len(weight), type(norm).__name__)
    _require_columns(linears, len(weight))
    old = _wide(weight) + offset
    new = (old / scale.to(old) - offset).to(weight.dtype)
    # A weight that rounds to nothing could not be multiplied back: such a channel stays as it is.
    lost = (old != 0) & (_wide(new) + offset == 0)
    new = torch.where(lost, weight, new)
    real = torch.where(old == 0, scale.to(old), old / (_wide(new) + offset))
    weight.copy_(new)
    bias = getattr(norm, "bias", None)
    if isinstance(bias, Tensor):
        bias.copy_(_wide(bias) / real)
    for linear in linears:
        _scale_columns_(linear, real)
    return real


def scaled_stats(stats: ActStats, scale: Tensor) -> ActStats:
    """The statistics of x / scale, from those of x: what calibration would see after a fold."""
    scale = scale.to(stats.mean_abs)
    second = (stats.hessian, stats.cross, stats.drift)
    hessian, cross, drift = (None if m is None else (m / scale).div_(scale.unsqueeze(-1)) for m in second)
    return replace(
        stats,
        channel_low=stats.channel_low / scale,
        channel_high=stats.channel_high / scale,
        mean_abs=stats.mean_abs / scale,
        hessian=hessian,
        sample=stats.sample / scale,
        cross=cross,
        drift=drift,
    )


def _read(linear: nn.Linear, work: Work | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias to compute with: the working ones, or the model's."""
    if work is not None:
        return work.weight, work.bias
    return _wide(linear.weight.detach()), None if linear.bias is None else _wide(linear.bias.detach())


def _write_(linear: nn.Linear, work: Work | None, weight: Tensor, bias: Tensor | None) -> None:
    if work is not None:
        work.weight, work.bias = weight, bias
    else:
        put_linear_(linear, weight, bias)


def put_linear_(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Give a Linear new parameters, in the dtype of those it has; these are left as they are."""
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(linear.bias.dtype), requires_grad=False)


def _wide(parameter: Tensor) -> Tensor:
    return parameter.to(torch.promote_types(torch.float32, parameter.dtype))


def _scale_columns_(linear: nn.Linear, scale: Tensor) -> None:
    wide = _wide(linear.weight)
    linear.weight.copy_(wide * scale.to(wide))


def _require_scale(scale: Tensor, k: int, where: str) -> None:
    if scale.shape != (k,):
        raise PlanError(f"{where}: cannot fold a scale of shape {list(scale.shape)}; it has {k} output channels")
    if not (scale.isfinite().all() and (scale > 0).all()):
        raise PlanError(f"{where}: a scale to be folded has to be positive and finite")


def _require_columns(linears: Iterable[nn.Linear], k: int) -> None:
    for linear in linears:
        if linear.in_features != k:
            raise PlanError(f"a scale of {k} channels does not fit a Linear with in_features={linear.in_features}")
