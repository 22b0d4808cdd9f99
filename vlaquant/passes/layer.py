"""Layers: working weights and statistics → codes, with a record of how well it went.

Layers that read the same tensor have the same Hessian. Rows of a weight do not know of each other in any of the
quantizers, so the weights of such layers are put on top of each other and solved as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlaquant.calibrate import ActStats
from vlaquant.errors import CalibrationError, CheckpointError
from vlaquant.numerics import QuantizedWeight, all_finite, qparams
from vlaquant.passes.awq import awq_clip, hessian_observer
from vlaquant.passes.gptq import gptq
from vlaquant.passes.loss import row_losses, row_losses_of_two, slices
from vlaquant.passes.refit import refit_scales
from vlaquant.passes.rtn import round_to_nearest
from vlaquant.recipe import Gptaq, Quantizer, Rtn
from vlaquant.scheme import Granularity, QuantSpec, Scheme


@dataclass(slots=True, eq=False)
class Work:
    """A layer on its way to codes: weight [n, k] and bias [n], scheme, and statistics of its input.

    Weights may have any float dtype where nothing but codes is made of them; transforms need float32.
    """

    weight: Tensor
    bias: Tensor | None
    scheme: Scheme
    stats: ActStats | None
    scale_dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """What happened to one layer.

    Attributes:
        quantizer: what made the codes, ``rtn`` or ``gptq``, with its clipping.
        loss: mean squared error of the layer's output over the calibration tokens, as a share of the output's mean
            square (float activations); None for a layer without data. With gptaq the output is that of the float
            model, so that the error holds what earlier layers did to the input.
        loss_rtn: the same for plain rounding of the same weight.
        notes: everything out of the ordinary: reverted, more damping, dead columns.
    """

    name: str
    scheme: str
    quantizer: str
    loss: float | None
    loss_rtn: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LayerRecord":
        """Inverse of :meth:`to_dict`, also after a way through JSON."""
        return cls(**{**values, "notes": tuple(values["notes"])})


def solve_groups(works: Mapping[str, Work]) -> list[tuple[str, ...]]:
    """The layers in groups that are solved as one: each with one Hessian, one kind of codes and one kind of scales.

    Groups are independent of each other, and come in the order of their first layers.
    """
    groups: dict[Any, list[str]] = {}
    for name, work in works.items():
        spec = work.scheme.weight
        alone = work.stats is None or work.stats.hessian is None or spec.granularity is Granularity.TENSOR
        key = name if alone else (id(work.stats), spec, work.scale_dtype)
        groups.setdefault(key, []).append(name)
    return [tuple(names) for names in groups.values()]


def quantize_layers(works: Mapping[str, Work], quantizer: Quantizer) -> dict[str, tuple[QuantizedWeight, LayerRecord]]:
    """Codes for all layers; plain rounding instead where the recipe's quantizer does worse or there is no data.

    Raises:
        CalibrationError: statistics that hold NaN or Inf.
        CheckpointError: a weight that does.
    """
    solved: dict[str, tuple[QuantizedWeight, LayerRecord]] = {}
    for names in solve_groups(works):
        solved |= _solve({name: works[name] for name in names}, quantizer)
    return {name: solved[name] for name in works}


def _solve(works: Mapping[str, Work], quantizer: Quantizer) -> dict[str, tuple[QuantizedWeight, LayerRecord]]:
    """One of :func:`solve_groups`."""
    _require_finite(works)
    first = next(iter(works.values()))
    weight = first.weight if len(works) == 1 else torch.cat([work.weight for work in works.values()])
    spec, stats = first.scheme.weight, first.stats
    if stats is None or stats.hessian is None:
        clip = quantizer.clip if quantizer.clip != "awq" else "mse"
        rounded = round_to_nearest(weight, spec, scale_dtype=first.scale_dtype, clip=clip)
        return {
            name: (rounded, LayerRecord(name, work.scheme.name, f"rtn {clip}", None, None, ()))
            for name, work in works.items()
        }
    plain = round_to_nearest(weight, spec, scale_dtype=first.scale_dtype)
    result, notes = _with_data(weight, plain, stats, quantizer, first.scale_dtype)
    if quantizer.refit:
        result = refit_scales(weight, result, stats.hessian)
    rows = _rows([len(work.weight) for work in works.values()])
    losses_rtn, powers = (_losses(codes, weight, stats, rows) for codes in (plain, None))
    losses = losses_rtn if result is plain else _losses(result, weight, stats, rows)
    solved = {}
    for (name, work), part, loss, loss_rtn, power in zip(works.items(), rows, losses, losses_rtn, powers, strict=True):
        scale = 1.0 / max(power, torch.finfo(torch.float32).tiny)
        chosen, used, more = result, f"{quantizer.kind} {quantizer.clip}", notes
        if loss > loss_rtn:
            worse = f"{quantizer.kind} reverted: {loss / loss_rtn:.3f} times the error of plain rounding"
            chosen, used, more = plain, "rtn minmax", (*notes, worse)
        record = LayerRecord(name, work.scheme.name, used, min(loss, loss_rtn) * scale, loss_rtn * scale, more)
        solved[name] = (chosen.rows(part), record)
    return solved


def _require_finite(works: Mapping[str, Work]) -> None:
    for name, work in works.items():
        if not all_finite(work.weight):
            raise CheckpointError(f"{name}: the weight holds NaN or Inf; look at the checkpoint")
        if work.stats is not None and work.stats.hessian is not None and not all_finite(work.stats.hessian):
            raise CalibrationError(f"{name}: the Hessian holds NaN or Inf; look at the calibration data")


def _rows(counts: Sequence[int]) -> list[slice]:
    """Where parts of so many rows lie when they are put on top of each other."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]


def _losses(quantized: QuantizedWeight | None, weight: Tensor, stats: ActStats, parts: Sequence[slice]) -> list[float]:
    """Squared output error of each part of the rows, averaged over tokens; without codes that of no weight at all."""
    assert stats.hessian is not None
    losses = torch.empty(len(weight), dtype=torch.float64)
    for rows in slices(*weight.shape):
        part = weight[rows].to(torch.float32)
        delta = -part if quantized is None else quantized.rows(rows).dequantize().sub_(part)
        if stats.cross is None or stats.drift is None:
            losses[rows] = row_losses(delta, stats.hessian).to(losses)
        else:
            losses[rows] = row_losses_of_two(delta, part, stats.hessian, stats.cross, stats.drift).to(losses)
    return [float(losses[part].sum()) for part in parts]


def _with_data(
    weight: Tensor, plain: QuantizedWeight, stats: ActStats, quantizer: Quantizer, scale_dtype: torch.dtype
) -> tuple[QuantizedWeight, tuple[str, ...]]:
    """What the recipe's quantizer makes of a weight; ``plain`` is what plain rounding made of it."""
    spec, hessian = plain.spec, stats.hessian
    assert hessian is not None
    if isinstance(quantizer, Rtn):
        if quantizer.clip == "minmax":
            return plain, ()
        if quantizer.clip == "awq":
            return awq_clip(weight, hessian, spec, scale_dtype=scale_dtype), ()
        return round_to_nearest(weight, spec, scale_dtype=scale_dtype, clip=quantizer.clip), ()
    shift: dict[str, Any] = {"cross": stats.cross, "alpha": quantizer.alpha} if isinstance(quantizer, Gptaq) else {}
    result = gptq(
        weight,
        hessian,
        spec,
        scale_dtype=scale_dtype,
        clip=hessian_observer(hessian) if quantizer.clip == "awq" else quantizer.clip,
        damp=quantizer.damp,
        block_size=quantizer.block_size,
        act_order=quantizer.act_order,
        **shift,
    )
    notes = []
    if result.dead_columns:
        notes.append(f"{result.dead_columns} input channels are always 0")
    if result.fallback is not None:
        notes.append(result.fallback)
    elif result.damp != quantizer.damp:
        notes.append(f"damping raised to {result.damp:g}")
    if result.float64:
        notes.append("the Hessian was factored in float64")
    return result.weight, tuple(notes)


def static_input(stats: ActStats, spec: QuantSpec, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale [1] and zero point [1] of a static activation from the range that calibration saw."""
    scale, zero = qparams(stats.low.reshape(1), stats.high.reshape(1), spec, scale_dtype)
    return scale, None if spec.symmetric else zero
