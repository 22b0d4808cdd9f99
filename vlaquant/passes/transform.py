"""Where SmoothQuant and AWQ meet a model: a scale for every fold, kept only where it lowers the output error.

Working weights are float32; of the model itself only norms and Linears that stay float change. The rounding of a norm's
new weight to its dtype is taken into the scale, so that norm and Linears together stay the same function whatever the
checkpoint's dtype. A Linear that stays float is rounded to its dtype once more.

Where columns share a scale (query heads that read one value head), each is one more set of tokens of the same channel:
ranges are the largest of all of them, and means the mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlaquant.calibrate import ActStats
from vlaquant.families import FoldGroup
from vlaquant.numerics import fake_quantize, min_max, qparams, round_weight, row_blocks
from vlaquant.passes.awq import awq_scales
from vlaquant.passes.fold import apply_fold_, channels_of, fold_layer_scale_, gathered, spread
from vlaquant.passes.layer import Work
from vlaquant.passes.loss import output_loss, token_mean, weight_loss
from vlaquant.passes.search import BestScale, best_scale
from vlaquant.passes.smoothquant import smooth_scale, smooth_scales
from vlaquant.recipe import Awq, LayerScale, SmoothQuant, Transform
from vlaquant.scheme import Granularity, QuantSpec

#: Rows of all targets together by which scales are compared; the best are then measured on all. (In SmolLM2, 1024 of
#: 3072 rows led to an error at most 0.1 % above that of the whole search, and 256 rows to 2 % at most.)
_SEARCHED_ROWS = 1024
_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class TransformRecord:
    """What happened to one fold.

    Attributes:
        kind: ``smoothquant``, ``awq`` or ``layerscale``.
        loss_before: mean squared output error of the targets with plain rounding, as a share of the output's square;
            None where nothing is compared: a LayerScale is always folded.
        loss_after: with the scale.
        kept: whether the scale was applied.
        strength: α of SmoothQuant, or the exponent that AWQ found (0 if none is better); 1 for a LayerScale.
        reverted: what the model computed differently with the scale, so that it was taken back; None if nothing was.
    """

    kind: str
    source: str
    targets: tuple[str, ...]
    loss_before: float | None
    loss_after: float | None
    kept: bool
    strength: float
    reverted: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TransformRecord":
        """Inverse of :meth:`to_dict`, also after a way through JSON."""
        return cls(**{**values, "targets": tuple(values["targets"])})


def suits(transform: Transform, group: FoldGroup, part: str) -> bool:
    """Whether a transform is for folds of this kind, and for the part of the model that its layers belong to."""
    of_kind = isinstance(transform, LayerScale) == (group.gamma is not None)
    return of_kind and (transform.parts is None or part in transform.parts)


def transform_group_(
    model: nn.Module, group: FoldGroup, works: Mapping[str, Work], transform: Transform
) -> TransformRecord:
    """Try ``transform`` on one fold that it :func:`suits`; changes weights and the source if it helps.

    At least one of the targets is in ``works``. Targets that shared statistics before share the scaled ones.
    """
    if isinstance(transform, LayerScale):
        fold_layer_scale_(model, group, works)
        return TransformRecord(transform.kind, group.source, group.targets, None, None, kept=True, strength=1.0)
    targets = [works[name] for name in group.targets if name in works]
    stats = targets[0].stats
    assert stats is not None
    columns, head_dim = targets[0].weight.shape[1], group.head_dim
    channels = channels_of(model, group)
    step = _step(targets)
    loss = _spread_first(_loss(targets if step > 1 else _stacked(targets, 1), stats), columns, head_dim)
    if isinstance(transform, SmoothQuant) and transform.alpha != "search":
        scale = smooth_scale(*_ranges(targets, stats, channels, head_dim), transform.alpha)
        best = BestScale(scale, transform.alpha, loss(scale), loss(torch.ones_like(scale)))
    else:
        estimate = None
        if step > 1:
            estimate = _spread_first(_loss(_stacked(targets, step), stats), columns, head_dim)
        candidates = _candidates(transform, targets, stats, channels, head_dim)
        best = best_scale(candidates, loss, estimate=estimate)
    kept = best.loss < best.loss_rtn
    if kept:
        apply_fold_(model, group, best.scale, works)
    return TransformRecord(transform.kind, group.source, group.targets, best.loss_rtn, best.loss, kept, best.strength)


def _candidates(
    transform: SmoothQuant | Awq, targets: Sequence[Work], stats: ActStats, channels: int, head_dim: int | None
) -> list[tuple[float, Tensor]]:
    """(strength, scale [m]) of all that a transform tries; the first is no scale."""
    if isinstance(transform, SmoothQuant):
        return smooth_scales(*_ranges(targets, stats, channels, head_dim))
    return awq_scales(gathered(stats.mean_abs, channels, head_dim).mean(dim=0), transform.grid)


def _ranges(
    targets: Sequence[Work], stats: ActStats, channels: int, head_dim: int | None
) -> tuple[Tensor, list[Tensor]]:
    """The largest |x| [m] of all columns that share a scale, and the weights with such columns below each other."""
    absmax = gathered(stats.absmax, channels, head_dim).amax(dim=0)
    return absmax, [gathered(work.weight, channels, head_dim).flatten(0, 1) for work in targets]


def _spread_first(loss: Callable[[Tensor], float], columns: int, head_dim: int | None) -> Callable[[Tensor], float]:
    return lambda scale: loss(spread(scale, columns, head_dim))


def _step(targets: Sequence[Work]) -> int:
    """Which every so manieth row shows well enough which scale is best: the error is a sum over rows."""
    step = -(-sum(len(work.weight) for work in targets) // _SEARCHED_ROWS)
    return step + (step % 2 == 0)  # odd, so as not to meet the same row of every attention head


def _stacked(targets: Sequence[Work], step: int) -> list[Work]:
    """Every ``step``-th row of the targets, same schemes on top of each other; all rows where they share a scale."""
    alike: dict[Any, list[Work]] = {}
    for i, work in enumerate(targets):
        shared_scale = work.scheme.weight.granularity is Granularity.TENSOR
        alike.setdefault(i if shared_scale else (work.scheme, work.scale_dtype), []).append(work)
    return [
        works[0] if isinstance(key, int) else replace(works[0], weight=torch.cat([w.weight[::step] for w in works]))
        for key, works in alike.items()
    ]


def _loss(targets: Sequence[Work], stats: ActStats) -> Callable[[Tensor], float]:
    """Scale -> relative output error of all targets, with rounded weights, and inputs where the scheme has them."""
    power = max(sum(_target_power(work, stats) for work in targets), torch.finfo(torch.float32).tiny)
    return lambda scale: sum(_target_loss(work, stats, scale) for work in targets) / power


def _target_power(work: Work, stats: ActStats) -> float:
    if work.scheme.activation is None:
        assert stats.hessian is not None
        return weight_loss(work.weight, stats.hessian)
    return token_mean((stats.sample @ work.weight.T).square().sum(dim=-1), stats.sample_weights)


def _target_loss(work: Work, stats: ActStats, scale: Tensor) -> float:
    seen = None
    if work.scheme.activation is not None:
        seen = _rounded_input(stats.sample / scale, work.scheme.activation, stats, scale)
    loss = 0.0
    for rows in row_blocks(work.weight, work.scheme.weight, _VALUES):
        weight = work.weight[rows]
        rounded = round_weight(weight * scale, work.scheme.weight, scale_dtype=work.scale_dtype)
        if seen is None:
            assert stats.hessian is not None
            loss += weight_loss(rounded.div_(scale).sub_(weight), stats.hessian)
        else:
            loss += output_loss(stats.sample, weight, seen, rounded, stats.sample_weights)
    return loss


def _rounded_input(x: Tensor, spec: QuantSpec, stats: ActStats, scale: Tensor) -> Tensor:
    if spec.dynamic:
        low, high = min_max(x)
    else:
        low, high = (stats.channel_low / scale).min(), (stats.channel_high / scale).max()
    step, zero = qparams(low, high, spec, torch.float32)
    return fake_quantize(x, step, zero, spec)
