"""Scaling that keeps the function: what is divided out of one module's output is multiplied into its readers.

All arithmetic is in float32, or float64 for float64 parameters, and rounded once to the parameter's dtype.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlaquant.calibrate.statistics import ActStats
from vlaquant.errors import PlanError


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
    hessian = None if stats.hessian is None else (stats.hessian / scale).div_(scale.unsqueeze(-1))
    return replace(
        stats,
        channel_low=stats.channel_low / scale,
        channel_high=stats.channel_high / scale,
        mean_abs=stats.mean_abs / scale,
        hessian=hessian,
        sample=stats.sample / scale,
    )


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
