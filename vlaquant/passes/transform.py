"""Where SmoothQuant and AWQ meet a model: a scale for every fold, kept only where it lowers the output error.

Working weights are float32; of the model itself only norms change. The rounding of a norm's new weight to its dtype is
taken into the scale, so that norm and Linears together stay the same function whatever the checkpoint's dtype.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats
from vlaquant.families import FoldGroup, norm_offset
from vlaquant.numerics import fake_quantize, qparams, quantize_weight
from vlaquant.passes.awq import awq_scale
from vlaquant.passes.fold import fold_norm_, scaled_stats
from vlaquant.passes.loss import output_loss, weight_loss
from vlaquant.passes.smoothquant import smooth_scale
from vlaquant.recipe import SmoothQuant, Transform
from vlaquant.scheme import QuantSpec, Scheme


@dataclass(slots=True, eq=False)
class Work:
    """A layer on its way to codes: float32 weight [n, k] and bias [n], scheme, and statistics of its input."""

    weight: Tensor
    bias: Tensor | None
    scheme: Scheme
    stats: ActStats | None
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class TransformRecord:
    """What happened to one fold.

    Attributes:
        kind: ``smoothquant`` or ``awq``.
        loss_before: mean squared output error of the targets with plain rounding, as a share of the output's square.
        loss_after: with the scale.
        kept: whether the scale was applied.
        strength: α of SmoothQuant, or the exponent that AWQ found.
    """

    kind: str
    source: str
    targets: tuple[str, ...]
    loss_before: float
    loss_after: float
    kept: bool
    strength: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


def transform_group_(
    model: nn.Module, group: FoldGroup, works: Mapping[str, Work], transform: Transform
) -> TransformRecord:
    """Try ``transform`` on one fold; changes the working weights and the source if it helps."""
    targets = [works[name] for name in group.targets]
    stats = targets[0].stats
    assert stats is not None
    loss = _loss(targets, stats)
    if isinstance(transform, SmoothQuant):
        strength = transform.alpha
        scale = smooth_scale(stats.absmax, [work.weight for work in targets], strength)
        before, after = loss(torch.ones_like(scale)), loss(scale)
    else:
        best = awq_scale(stats.mean_abs, loss, grid=transform.grid)
        scale, strength, before, after = best.scale, best.ratio, best.loss_rtn, best.loss
    kept = after < before
    if kept:
        _apply_(model, group, works, scale)
    return TransformRecord(transform.kind, group.source, group.targets, before, after, kept, strength)


def _loss(targets: Sequence[Work], stats: ActStats) -> Callable[[Tensor], float]:
    """Scale -> relative output error of all targets, with rounded weights, and inputs where the scheme has them."""
    power = max(sum(_target_power(work, stats) for work in targets), torch.finfo(torch.float32).tiny)
    return lambda scale: sum(_target_loss(work, stats, scale) for work in targets) / power


def _target_power(work: Work, stats: ActStats) -> float:
    if work.scheme.activation is None:
        assert stats.hessian is not None
        return weight_loss(work.weight, stats.hessian)
    return float((stats.sample @ work.weight.T).square().sum(dim=-1).mean())


def _target_loss(work: Work, stats: ActStats, scale: Tensor) -> float:
    rounded = quantize_weight(work.weight * scale, work.scheme.weight, scale_dtype=work.scale_dtype).dequantize()
    if work.scheme.activation is None:
        assert stats.hessian is not None
        return weight_loss(rounded / scale - work.weight, stats.hessian)
    x = stats.sample / scale
    return output_loss(stats.sample, work.weight, _rounded_input(x, work.scheme.activation, stats, scale), rounded)


def _rounded_input(x: Tensor, spec: QuantSpec, stats: ActStats, scale: Tensor) -> Tensor:
    if spec.dynamic:
        low, high = x.aminmax(dim=-1, keepdim=True)
    else:
        scaled = scaled_stats(stats, scale)
        low, high = scaled.low, scaled.high
    step, zero = qparams(low, high, spec, torch.float32)
    return fake_quantize(x, step, zero, spec)


def _apply_(model: nn.Module, group: FoldGroup, works: Mapping[str, Work], scale: Tensor) -> None:
    """Divide the source's output by ``scale`` and multiply the targets' columns by what the division really was."""
    if group.source in works:
        source = works[group.source]
        source.weight = source.weight / scale.unsqueeze(-1)
        if source.bias is not None:
            source.bias = source.bias / scale
    else:
        norm = model.get_submodule(group.source)
        scale = fold_norm_(norm, scale, offset=norm_offset(norm))
    for name in group.targets:
        work = works[name]
        assert work.stats is not None
        work.weight = work.weight * scale
        work.stats = scaled_stats(work.stats, scale)
